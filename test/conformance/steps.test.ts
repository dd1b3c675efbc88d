import { describe, expect, it } from 'vitest';
import { EventId, Id, type ScriptedPeer } from '../kvmi/peer.js';
import type { Program } from '../kvmi/program.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';

const RW = 6;

const control = (vcpu: number, enable: number) => `0${vcpu}000000000000000${enable}00000000000000`;
const controls = (peer: ScriptedPeer) => peer.all(Id.controlSingleStep).map((m) => m.body.toString('hex'));

/** Has a vCPU step once, and returns what the callbacks said. */
async function step(program: Program, peer: ScriptedPeer, vcpu: number): Promise<readonly string[]> {
  const seq = peer.raise(vcpu, EventId.singleStep, Buffer.alloc(8));
  const { result, events } = await program.run('listen 10000');
  expect(result).toBe('0');
  expect((await peer.reply(seq)).body.toString('hex')).toBe(`0${vcpu}00000000000000000b000000000000`);
  return events;
}

describe.each(LIBRARIES)('single steps with $library', ({ path }) => {
  const { start } = programsOn(path);

  it.each(VCPU_COUNTS)('of each of %s vCPUs are switched on, reported, and switched off', async (vcpus) => {
    const { program, peer } = await start({ vcpus });
    const all = Array.from({ length: vcpus }, (_, vcpu) => vcpu);
    expect(await program.result(`watch-steps 0 ${2 ** vcpus - 1}`)).toBe('0');
    expect(await program.result('watch-steps 1 1')).toBe('1');
    for (const vcpu of all)
      expect(await step(program, peer, vcpu)).toEqual([
        `event step slot=0 vcpu=${vcpu} gla=0x110 offset=0x110`,
      ]);
    expect(await program.run('clear 0')).toEqual({ result: '0', events: ['freed slot=0 status=0'] });
    expect(controls(peer)).toEqual([
      ...all.map((vcpu) => control(vcpu, 1)),
      ...all.map((vcpu) => control(vcpu, 0)),
      // Nobody is left who steps: all of them once more.
      ...all.map((vcpu) => control(vcpu, 0)),
    ]);
    expect(await program.result('watch-steps 1 1')).toBe('0');
  });

  it('are left on where another event watches them', async () => {
    const { program, peer } = await start({ vcpus: 3 });
    await program.run('watch-steps 0 2');
    await program.run('watch-steps 1 4');
    expect(await program.result('clear 0')).toBe('0');
    expect(controls(peer)).toEqual([control(1, 1), control(2, 1), control(1, 0)]);
    expect(await step(program, peer, 2)).toEqual(['event step slot=1 vcpu=2 gla=0x110 offset=0x110']);
  });

  it('that failed are answered without a callback', async () => {
    const { program, peer } = await start();
    await program.run('watch-steps 0 1');
    const seq = peer.raise(0, EventId.singleStep, Buffer.from('0100000000000000', 'hex'));
    expect(await program.run('listen 10000')).toEqual({ result: '0', events: [] });
    await peer.reply(seq);
  });

  it('of no vCPU are not registered', async () => {
    const { program, peer } = await start();
    expect(await program.result('watch-steps 0 0')).toBe('1');
    expect(controls(peer)).toEqual([]);
  });

  it('that the hypervisor refuses on one vCPU are stopped on all of them', async () => {
    const { program, peer } = await start({ vcpus: 3 });
    peer.answers.set(Id.controlSingleStep, ({ body }) =>
      body.readUInt16LE(0) === 1 ? -95 : Buffer.alloc(0),
    );
    expect(await program.result('watch-steps 0 7')).toBe('1');
    expect(controls(peer)).toEqual([
      control(0, 1),
      control(1, 1),
      control(0, 0),
      control(1, 0),
      control(2, 0),
    ]);
    peer.answers.clear();
    expect(await program.result('watch-steps 0 7')).toBe('0');
  });

  it.each(VCPU_COUNTS)('are toggled by a response: the last of %s vCPUs', async (vcpus) => {
    const { program, peer } = await start({ vcpus });
    const vcpu = vcpus - 1;
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions respond 32');
    for (const enable of [1, 0, 1]) {
      const seq = peer.raisePageFault(vcpu, 0x5000n, 0x5000n);
      await program.run('listen 10000');
      await peer.reply(seq);
      expect(controls(peer).at(-1)).toBe(control(vcpu, enable));
    }
  });

  it('are toggled by a response to a step, and none is answered for the rest', async () => {
    const { program, peer } = await start();
    await program.run('watch-steps 0 1');
    await program.run('actions respond 32');
    await step(program, peer, 0);
    expect(controls(peer)).toEqual([control(0, 1), control(0, 0)]);
  });

  it('are toggled by a call, which must change something', async () => {
    const { program, peer } = await start();
    await program.run('watch-steps 0 1');
    expect(await program.result('toggle 0 1 1')).toBe('0');
    expect(await program.result('toggle 0 1 1')).toBe('1');
    expect(await program.result('toggle 0 1 0')).toBe('0');
    expect(await program.result('toggle 0 1 0')).toBe('1');
    // Adding a vCPU starts all that the event has.
    expect(controls(peer)).toEqual([control(0, 1), control(0, 1), control(1, 1), control(1, 0)]);
  });

  it('are handed over to another event by a toggle that fails', async () => {
    const { program, peer } = await start();
    await program.run('watch-steps 0 1');
    await program.run('watch-steps 1 2');
    expect(await program.result('toggle 1 0 1')).toBe('1');
    expect(await step(program, peer, 0)).toEqual(['event step slot=1 vcpu=0 gla=0x110 offset=0x110']);
  });

  it('of a vCPU that does not exist can be toggled on, to no effect', async () => {
    const { program } = await start({ vcpus: 2 });
    await program.run('watch-steps 0 1');
    expect(await program.result('toggle 0 2 1')).toBe('0');
    expect(await program.result('toggle 0 2 1')).toBe('1');
  });

  it.each(VCPU_COUNTS)('are counted down, and the callback runs at the last: %s vCPUs', async (vcpus) => {
    const { program, peer } = await start({ vcpus });
    const vcpu = vcpus - 1;
    await program.run(`watch 0 5 ${RW}`);
    expect(await program.result(`step 0 ${vcpu} 0`)).toBe('1');
    expect(await program.result(`step 0 ${vcpu} 3`)).toBe('0');
    expect(controls(peer)).toEqual([control(vcpu, 1)]);
    expect(await step(program, peer, vcpu)).toEqual([]);
    expect(await step(program, peer, vcpu)).toEqual([]);
    // The last step's listen pauses the guest and ends the stepping.
    expect(await step(program, peer, vcpu)).toEqual(['event steps-done slot=0']);
    const stops = Array.from({ length: vcpus }, (_, each) => control(each, 0));
    expect(controls(peer)).toEqual([control(vcpu, 1), control(vcpu, 0), ...stops]);
  });

  it('are counted for several callers at once', async () => {
    const { program, peer } = await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run(`watch 1 6 ${RW}`);
    expect(await program.result('step 0 1 1')).toBe('0');
    expect(await program.result('step 1 1 3')).toBe('0');
    expect(await step(program, peer, 1)).toEqual(['event steps-done slot=0']);
    expect(await step(program, peer, 1)).toEqual([]);
    expect(await step(program, peer, 1)).toEqual(['event steps-done slot=1']);
    expect(controls(peer).slice(0, 2)).toEqual([control(1, 1), control(1, 0)]);
  });

  it('are counted again after they were', async () => {
    const { program, peer } = await start();
    await program.run(`watch 0 5 ${RW}`);
    for (let round = 0; round < 3; round++) {
      expect(await program.result('step 0 1 1')).toBe('0');
      expect(await step(program, peer, 1)).toEqual(['event steps-done slot=0']);
    }
  });

  it('are counted from a violation on, and the event is registered again at the last', async () => {
    const { program, peer } = await start({ vcpus: 1 });
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions step 2');
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
    expect((await program.run('listen 10000')).events.slice(1)).toEqual(['in step 0']);
    await peer.reply(seq);
    await program.run('actions');
    await program.run('clear 0');
    const before = peer.all(Id.setPageAccess).length;
    await step(program, peer, 0);
    expect(peer.all(Id.setPageAccess)).toHaveLength(before);
    await step(program, peer, 0);
    expect(peer.all(Id.setPageAccess).at(-1)!.body.toString('hex', 8)).toBe(
      '00500000000000000400000000000000',
    );
  });

  it('are not counted where they are watched, and not watched where they are counted', async () => {
    const { program } = await start();
    await program.run('watch-steps 0 2');
    expect(await program.result('step 1 1 1')).toBe('1');
    expect(await program.result('step 1 0 1')).toBe('0');
    expect(await program.result('watch-steps 2 1')).toBe('1');
  });

  it('are counted of one vCPU too many, in vain, and of no further one', async () => {
    const { program, peer } = await start({ vcpus: 2 });
    expect(await program.result('step 0 2 1')).toBe('0');
    expect(await program.result('step 0 3 1')).toBe('1');
    expect(controls(peer)).toEqual([]);
  });
});
