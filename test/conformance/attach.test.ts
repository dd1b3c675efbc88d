import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { eventually } from '../kvmi/eventually.js';
import { greeting, Id, PAGE, type PeerOptions, ScriptedPeer } from '../kvmi/peer.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';

const FAILED_DRIVER = '1 error=2';
const VM_NOT_FOUND = '1 error=3';
const [DOMAINNAME, DOMAINID, EVENTS] = [1, 2, 4];

describe.each(LIBRARIES)('attaching with $library', ({ path }) => {
  const { load, start } = programsOn(path);

  it.each(VCPU_COUNTS)(
    'asks for the version, the vCPUs, the events of each vCPU and the size of memory, in this order: %s vCPUs',
    async (vcpus) => {
      const { program, peer } = await start({ vcpus, memory: Buffer.alloc(48 * PAGE) });
      const events = Array.from({ length: vcpus }, (_, vcpu) =>
        [1, 2, 6, 11].map((event) => `9:${hex8(vcpu)}00000000000000${hex8(event)}00010000000000`),
      );
      expect(peer.log()).toEqual(['2:', '5:', ...events.flat(), '29:']);
      expect(new Set(peer.received.map((m) => m.seq)).size).toBe(peer.received.length);
      const size = `0x${(48 * PAGE).toString(16)}`;
      expect(await program.result('size')).toBe(`${vcpus} ${size} ${size}`);
    },
  );

  it('has version 9 of the events', async () => {
    expect(await load().result('version')).toBe('9');
  });

  it('leaves events alone when they were not asked for', async () => {
    const program = load();
    const [status, peer] = await Promise.all([
      program.init(DOMAINNAME),
      ScriptedPeer.connect(program.socketPath),
    ]);
    expect(status).toBe('0 error=0');
    expect(peer.all(Id.controlEvents)).toEqual([]);
    expect(await program.result('watch 0 5 6')).toBe('1');
    expect(await program.result('listen 0')).toBe('1');
    expect(await program.result('pending')).toBe('-1');
    expect(await program.result('read 0 4')).toBe('0 4 00000000');
  });

  it('answers the greeting with 24 bytes that begin with their size', async () => {
    const { peer } = await start();
    expect(peer.greetingReply.toString('hex')).toBe(`18000000${'00'.repeat(20)}`);
  });

  it.each<[string, PeerOptions]>([
    ['a greeting longer than is known', { greeting: greeting(5000) }],
    ['a newer version', { version: 7 }],
  ])('accepts %s', async (_, options) => {
    const { program } = await start(options);
    expect(await program.result('destroy')).toBe('0');
  });

  it.each<[string, PeerOptions]>([
    ['too short a greeting', { greeting: greeting(31) }],
    ['too long a greeting', { greeting: greeting(65537) }],
    ['version 0', { version: 0 }],
  ])('turns away a peer with %s and goes on waiting for another', async (_, options) => {
    const program = load();
    const status = program.init();
    const bad = await ScriptedPeer.connect(program.socketPath, options);
    await eventually(() => bad.closed).toBe(true);
    await ScriptedPeer.connect(program.socketPath);
    expect(await status).toBe('0 error=0');
  });

  it('fails within a bounded time when nobody connects, and when somebody connects and says nothing', async () => {
    const [alone, silent] = [load(), load()];
    const mute = ScriptedPeer.connect(silent.socketPath, { greeting: Buffer.alloc(0) });
    expect(await Promise.all([alone.init(), silent.init()])).toEqual([FAILED_DRIVER, FAILED_DRIVER]);
    (await mute).close();
  });

  it.each<[string, number, number]>([
    ['the number of vCPUs', Id.getGuestInfo, -22],
    ['events', Id.controlEvents, -95],
    ['the size of memory', Id.getMaxGfn, -1],
  ])(
    'fails when the hypervisor refuses to tell or control %s, and can be tried again',
    async (_, id, error) => {
      const program = load();
      const status = program.init();
      const peer = await ScriptedPeer.connect(program.socketPath);
      peer.answers.set(id, () => error);
      expect(await status).toBe(FAILED_DRIVER);
      await eventually(() => peer.closed).toBe(true);
      const [again] = await Promise.all([program.init(), ScriptedPeer.connect(program.socketPath)]);
      expect(again).toBe('0 error=0');
    },
  );

  it('fails at once on a path that cannot be', async () => {
    expect(await load().init(undefined, '/nonexistent/directory/socket')).toBe(FAILED_DRIVER);
  });

  it('takes over the socket that a dead program left behind', async () => {
    const [program, dead] = [load(), load()];
    const status = dead.init(undefined, program.socketPath);
    await eventually(() => existsSync(program.socketPath)).toBe(true);
    process.kill(dead.pid, 'SIGKILL');
    await expect(status).rejects.toThrow('SIGKILL');
    expect(existsSync(program.socketPath)).toBe(true);
    const [again] = await Promise.all([program.init(), ScriptedPeer.connect(program.socketPath)]);
    expect(again).toBe('0 error=0');
  });

  it('refuses a mode that does not exist, and flags that do not name exactly one guest', async () => {
    const program = load();
    const UNKNOWN_MODE = 99;
    expect(await program.init(DOMAINNAME | EVENTS, program.socketPath, UNKNOWN_MODE)).toBe('1 error=0');
    expect(await program.init(EVENTS)).toBe(VM_NOT_FOUND);
    expect(await program.init(DOMAINNAME | DOMAINID | EVENTS)).toBe(VM_NOT_FOUND);
  });

  it('works again and again after a destroy', async () => {
    const { program, peer } = await start({ vcpus: 3 });
    expect(await program.result('destroy')).toBe('0');
    await eventually(() => peer.closed).toBe(true);
    for (let i = 0; i < 5; i++) {
      const [status, next] = await Promise.all([
        program.init(),
        ScriptedPeer.connect(program.socketPath, { vcpus: 3 }),
      ]);
      expect(status).toBe('0 error=0');
      expect(await program.result('watch 0 5 6')).toBe('0');
      const seq = next.raisePageFault(2, 0x5000n, 0x5000n);
      expect((await program.run('listen 10000')).events).toHaveLength(1);
      await next.reply(seq);
      expect(await program.result('clear 0')).toBe('0');
      expect(await program.result('destroy')).toBe('0');
      await eventually(() => next.closed).toBe(true);
    }
  });

  it('works again after a hypervisor that went away', async () => {
    const { program, peer } = await start();
    peer.memory[0] = 0x11;
    expect(await program.result('read 0 1')).toBe('0 1 11');
    peer.close();
    expect(await program.result('listen 10000')).toBe('1');
    expect(await program.result('destroy')).toBe('0');
    const [status] = await Promise.all([program.init(), ScriptedPeer.connect(program.socketPath)]);
    expect(status).toBe('0 error=0');
    // Nothing of the guest before is left.
    expect(await program.result('read 0 1')).toBe('0 1 00');
  });
});

function hex8(value: number): string {
  return value.toString(16).padStart(2, '0');
}
