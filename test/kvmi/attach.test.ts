import { existsSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { eventually } from './eventually.js';
import { greeting, Id, PAGE, type PeerOptions, ScriptedPeer } from './peer.js';
import { attach, isBundled, Program } from './program.js';

const FAILED_DRIVER = '1 error=2';

const programs: Program[] = [];
function newProgram(): Program {
  const program = new Program();
  programs.push(program);
  return program;
}
afterEach(async () => {
  await Promise.all(programs.splice(0).map((program) => program.end()));
});

describe('attaching', () => {
  it('asks for the version, the vCPUs, the events of each vCPU and the size of memory, in this order', async () => {
    const { program, peer } = await attach({ vcpus: 2, memory: Buffer.alloc(48 * PAGE) });
    expect(peer.log()).toEqual([
      '2:',
      '5:',
      '9:00000000000000000100010000000000',
      '9:00000000000000000200010000000000',
      '9:00000000000000000600010000000000',
      '9:00000000000000000b00010000000000',
      '9:01000000000000000100010000000000',
      '9:01000000000000000200010000000000',
      '9:01000000000000000600010000000000',
      '9:01000000000000000b00010000000000',
      '29:',
    ]);
    expect(new Set(peer.received.map((m) => m.seq)).size).toBe(peer.received.length);
    expect(await program.result('size')).toBe(
      `2 0x${(48 * PAGE).toString(16)} 0x${(48 * PAGE).toString(16)}`,
    );
    expect(await program.end()).toBe(0);
  });

  it('leaves events alone when they were not asked for', async () => {
    const program = newProgram();
    const [status, peer] = await Promise.all([program.init(1), ScriptedPeer.connect(program.socketPath)]);
    expect(status).toBe('0 error=0');
    expect(peer.all(Id.controlEvents)).toEqual([]);
    expect(await program.result('watch 0 5 6')).toBe('1');
    expect(await program.result('listen 0')).toBe('1');
    expect(await program.result('pending')).toBe('-1');
    expect(await program.result('read 0 4')).toBe('0 4 00000000');
  });

  it('answers the greeting with 24 bytes that begin with their size', async () => {
    const { program, peer } = await attach();
    expect(peer.greetingReply.toString('hex')).toBe(`18000000${'00'.repeat(20)}`);
    expect(await program.end()).toBe(0);
  });

  it.each<[string, PeerOptions]>([
    ['a greeting longer than is known', { greeting: greeting(5000) }],
    ['a newer version', { version: 7 }],
  ])('accepts %s', async (_, options) => {
    const { program } = await attach(options);
    expect(await program.end()).toBe(0);
  });

  it.each<[string, PeerOptions]>([
    ['too short a greeting', { greeting: greeting(31) }],
    ['too long a greeting', { greeting: greeting(65537) }],
    ['version 0', { version: 0 }],
  ])('turns away a peer with %s and goes on waiting for another', async (_, options) => {
    const program = newProgram();
    const status = program.init();
    const bad = await ScriptedPeer.connect(program.socketPath, options);
    await eventually(() => bad.closed).toBe(true);
    await ScriptedPeer.connect(program.socketPath);
    expect(await status).toBe('0 error=0');
  });

  it('fails within a bounded time when nobody connects, and when somebody connects and says nothing', async () => {
    const [alone, silent] = [newProgram(), newProgram()];
    const mute = ScriptedPeer.connect(silent.socketPath, { greeting: Buffer.alloc(0) });
    expect(await Promise.all([alone.init(), silent.init()])).toEqual([FAILED_DRIVER, FAILED_DRIVER]);
    (await mute).close();
    if (isBundled) expect(existsSync(alone.socketPath)).toBe(false);
  });

  it.runIf(isBundled)(
    'fails within a bounded time when one comes after the other and none tells its version',
    async () => {
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
    },
  );

  it('fails when a command of the attach is refused or answered with nonsense', async () => {
    const refusals: [number, Buffer | number][] = [
      [Id.getGuestInfo, -22],
      [Id.getGuestInfo, Buffer.alloc(16)],
      [Id.getGuestInfo, Buffer.from('ffffffff000000000000000000000000', 'hex')],
      [Id.controlEvents, -95],
      [Id.getMaxGfn, -1],
      [Id.getMaxGfn, Buffer.alloc(8, 0xff)],
    ];
    for (const [id, answer] of isBundled ? refusals : refusals.slice(0, 1)) {
      const program = newProgram();
      const status = program.init();
      const peer = await ScriptedPeer.connect(program.socketPath);
      peer.answers.set(id, () => answer);
      expect(await status).toBe(FAILED_DRIVER);
    }
  });

  it('fails at once on an unusable path, and touches no file that is not a socket', async () => {
    const program = newProgram();
    const file = `${program.socketPath}.txt`;
    writeFileSync(file, 'mine');
    expect(await program.init(5, '/nonexistent/directory/socket')).toBe(FAILED_DRIVER);
    if (isBundled) {
      expect(await program.init(5, file)).toBe(FAILED_DRIVER);
      expect(await program.init(5, `/tmp/${'x'.repeat(104)}`)).toBe(FAILED_DRIVER);
      expect(await program.init(5, '7.sock')).toBe(FAILED_DRIVER);
      expect(existsSync(file)).toBe(true);
    }
  });

  it('takes over the socket that a dead program left behind', async () => {
    const program = newProgram();
    const dead = newProgram();
    const status = dead.init(5, program.socketPath);
    await eventually(() => existsSync(program.socketPath)).toBe(true);
    process.kill(dead.pid, 'SIGKILL');
    await expect(status).rejects.toThrow('SIGKILL');
    expect(existsSync(program.socketPath)).toBe(true);
    const [again] = await Promise.all([program.init(), ScriptedPeer.connect(program.socketPath)]);
    expect(again).toBe('0 error=0');
  });

  it.runIf(isBundled)('does not take the socket of a program that is waiting there', async () => {
    const [first, second] = [newProgram(), newProgram()];
    const status = first.init();
    await eventually(() => existsSync(first.socketPath)).toBe(true);
    expect(await second.init(5, first.socketPath)).toBe(FAILED_DRIVER);
    await ScriptedPeer.connect(first.socketPath);
    expect(await status).toBe('0 error=0');
  });

  it.runIf(isBundled)('refuses another mode, and flags that do not name exactly one guest', async () => {
    const program = newProgram();
    const FILE = 2;
    expect(await program.init(5, program.socketPath, FILE)).toMatch(/^1 /);
    expect(await program.init(4)).toBe('1 error=3');
    expect(await program.init(1 | 2 | 4)).toBe('1 error=3');
  });

  it('can attach again after a destroy', async () => {
    const { program, peer } = await attach();
    expect(await program.result('destroy')).toBe('0');
    await eventually(() => peer.closed).toBe(true);
    const [status] = await Promise.all([program.init(), ScriptedPeer.connect(program.socketPath)]);
    expect(status).toBe('0 error=0');
    expect(await program.end()).toBe(0);
  });
});

describe('destroying', () => {
  it('pauses, turns the events of each vCPU off, resumes and disconnects', async () => {
    const { program, peer } = await attach({ vcpus: 1 });
    const before = peer.received.length;
    expect(await program.result('destroy')).toBe('0');
    await eventually(() => peer.closed).toBe(true);
    const off = [1, 2, 6, 11].map((event) => `9:0000000000000000${hex8(event)}00000000000000`);
    const log = peer.log(before);
    expect(log.slice(0, 3)).toEqual([
      '27:0001000000000000',
      '7:00000000000000000100000000000000',
      '27:0101000000000000',
    ]);
    expect(log.filter((line) => line.startsWith('9:'))).toEqual(off);
    expect(log.at(-1)).toBe(`0:0000000000000000${'000a'}000000000000`);
    expect(await program.end()).toBe(0);
  });

  it('answers an event that is still outstanding without calling back', async () => {
    const { program, peer } = await attach({ vcpus: 1 });
    await program.run('watch 0 5 6');
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
    const outcome = await program.run('destroy');
    expect(outcome).toEqual({ result: '0', events: [] });
    await peer.reply(seq);
    expect(await program.end()).toBe(0);
  });

  it.runIf(isBundled)('lets a guest go that was paused twice', async () => {
    const { program, peer } = await attach({ vcpus: 2 });
    await program.run('pause');
    await program.run('pause');
    expect(await program.result('destroy')).toBe('0');
    await eventually(() => peer.all(Id.eventReply).length).toBe(2);
  });
});

function hex8(value: number): string {
  return value.toString(16).padStart(2, '0');
}
