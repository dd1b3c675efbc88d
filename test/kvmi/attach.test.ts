import { existsSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { eventually } from './eventually.js';
import { EventId, greeting, Id, ScriptedPeer } from './peer.js';
import { attach, BUNDLED, Program } from './program.js';

const FAILED_DRIVER = '1 error=2';
const RW = 6;

const programs: Program[] = [];
function newProgram(): Program {
  const program = new Program(BUNDLED);
  programs.push(program);
  return program;
}
afterEach(async () => {
  await Promise.all(programs.splice(0).map((program) => program.end()));
});

describe('attaching', () => {
  it('leaves no socket behind, whether somebody has connected or not', async () => {
    const [alone, attached] = [newProgram(), newProgram()];
    const [, status] = await Promise.all([
      ScriptedPeer.connect(attached.socketPath),
      attached.init(),
      alone.init(),
    ]);
    expect(status).toBe('0 error=0');
    expect([alone, attached].map(({ socketPath }) => existsSync(socketPath))).toEqual([false, false]);
  });

  it('fails within a bounded time when one comes after the other and none tells its version', async () => {
    const program = newProgram();
    let waiting = true;
    const come = async () => {
      while (waiting) {
        await new Promise((gone) => {
          const socket = connect(program.socketPath).resume();
          socket.on('connect', () => socket.write(greeting()));
          socket.on('error', () => {});
          socket.on('close', gone);
        });
        await sleep(5);
      }
    };
    const coming = [come(), come()];
    expect(await program.init()).toBe(FAILED_DRIVER);
    waiting = false;
    await Promise.all(coming);
  });

  it.each<[string, number, Buffer]>([
    ['no vCPUs', Id.getGuestInfo, Buffer.alloc(16)],
    ['impossibly many vCPUs', Id.getGuestInfo, Buffer.from('ffffffff000000000000000000000000', 'hex')],
    ['impossibly much memory', Id.getMaxGfn, Buffer.alloc(8, 0xff)],
  ])('fails on a guest of %s', async (_, id, answer) => {
    const program = newProgram();
    const status = program.init();
    const peer = await ScriptedPeer.connect(program.socketPath);
    peer.answers.set(id, () => answer);
    expect(await status).toBe(FAILED_DRIVER);
  });

  it('touches no file that is not a socket, and refuses a path that libvmi takes for another', async () => {
    const program = newProgram();
    const file = `${program.socketPath}.txt`;
    writeFileSync(file, 'mine');
    for (const path of [file, `/tmp/${'x'.repeat(104)}`, '7.sock'])
      expect(await program.init(undefined, path)).toBe(FAILED_DRIVER);
    expect(existsSync(file)).toBe(true);
  });

  it('does not take the socket of a program that is waiting there', async () => {
    const [first, second] = [newProgram(), newProgram()];
    const status = first.init();
    await eventually(() => existsSync(first.socketPath)).toBe(true);
    expect(await second.init(undefined, first.socketPath)).toBe(FAILED_DRIVER);
    await ScriptedPeer.connect(first.socketPath);
    expect(await status).toBe('0 error=0');
  });
});

describe('destroying lets go a guest', () => {
  it.each(['once', 'twice'])('that was paused %s', async (often) => {
    const { program, peer } = await attach(BUNDLED, { vcpus: 2 });
    for (const _ of often === 'once' ? [1] : [1, 2]) await program.run('pause');
    expect(await program.result('destroy')).toBe('0');
    await eventually(() => peer.all(Id.eventReply).length).toBe(2);
    expect(await program.end()).toBe(0);
  });

  it.each([
    ['a violation that nobody handles', '', 0x6000n],
    ['a violation with more data than fits', 'emulate-size 257', 0x5000n],
    ['a violation whose registers were refused', 'respond 128', 0x5000n],
  ])('whose vCPU stands still at %s', async (_, actions, gpa) => {
    const { program, peer } = await attach(BUNDLED, { vcpus: 2 });
    peer.answers.set(Id.setRegisters, () => -22);
    await program.run(`watch 0 5 ${RW}`);
    await program.run(`actions ${actions}`);
    const seq = peer.raisePageFault(1, gpa, gpa);
    expect(await program.result('listen 10000')).toBe('0');
    expect(await program.run('destroy')).toEqual({ result: '0', events: [] });
    expect((await peer.reply(seq)).body.toString('hex', 16)).toBe('00'.repeat(272));
    // The event, then both pauses.
    await eventually(() => peer.all(Id.eventReply).length).toBe(3);
    expect(await program.end()).toBe(0);
  });

  it('whose vCPU stands still at a write to a register, with the value that it writes', async () => {
    const { program, peer } = await attach(BUNDLED, { vcpus: 1 });
    const write = Buffer.alloc(24);
    write.writeBigUInt64LE(0x1122334455667788n, 16);
    const seq = peer.raise(0, EventId.controlRegister, write);
    expect(await program.result('listen 10000')).toBe('0');
    expect(await program.result('destroy')).toBe('0');
    expect((await peer.reply(seq)).body.toString('hex', 16)).toBe('8877665544332211');
    expect(await program.end()).toBe(0);
  });

  it('of which a vCPU never stops, within a bounded time', async () => {
    const { program, peer } = await attach(BUNDLED, { vcpus: 2 });
    peer.reportsPauses = false;
    expect(await program.result('destroy')).toBe('0');
    await eventually(() => peer.closed).toBe(true);
    expect(await program.end()).toBe(0);
  });
});

describe('a hypervisor that connects again', () => {
  it('is not accepted: its restrictions would be lost unnoticed', async () => {
    const { program, peer } = await attach(BUNDLED);
    peer.close();
    expect(await program.result('listen 10000')).toBe('1');
    expect(existsSync(program.socketPath)).toBe(false);
    expect(await program.end()).toBe(0);
  });
});
