import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { MemtablesError } from '../../src/errors.js';
import { openSession } from '../../src/libvmi/open-session.js';
import type { LibvmiSession } from '../../src/libvmi/session.js';
import { createHeartbeat, Watchdog } from '../../src/libvmi/watchdog.js';
import type { Violation } from '../../src/vmi/hypervisor.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { GPR_NAMES, type Registers } from '../../src/x86/registers.js';
import { EventId, Id } from '../kvmi/peer.js';
import { LIBRARIES } from '../libvmi/libraries.js';
import { Peer } from '../libvmi/peer.js';
import type { PageFault } from '../libvmi/peer-thread.js';
import { codeOf } from '../support/code-of.js';

const VCPUS = 2;
const FRAMES = 64;
const MEMORY_BYTES = FRAMES * 4096;
const PATIENCE_MS = 10_000;
const READ = 1;
const WRITE = 2;
const EXECUTE = 4;
const ALL_ACCESS = 7;
const EXECUTE_ONLY = 4;

const CR0 = 224;
const CR4 = 248;
const CR4_PAE = 1n << 5n;
const CR4_LA57 = 1n << 12n;

const GVA = 0xffff_f800_0000_3010n;
const GPA = 0x3010n;
const FRAME = 3n;

function fault(overrides: Partial<PageFault> = {}): PageFault {
  return { vcpu: 0, gva: GVA, gpa: GPA, access: READ, rip: 0xffff_f800_0000_0042n, ...overrides };
}

describe.each(LIBRARIES)('a session on $library', ({ path }) => {
  let directory: string;
  let socket: string;
  let peer: Peer;
  let opened: LibvmiSession | undefined;

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'memtables-libvmi-'));
    socket = join(directory, 'kvmi.sock');
    peer = await Peer.start({ socket, vcpus: VCPUS, frames: FRAMES });
  });

  afterEach(async () => {
    try {
      opened?.close();
    } finally {
      opened = undefined;
      await peer.stop();
      rmSync(directory, { recursive: true });
    }
  });

  function open(): LibvmiSession {
    opened = openSession({ name: 'guest', socket, libraryPath: path });
    return opened;
  }

  describe('attaching', () => {
    test('reports the vCPUs and the exclusive end of memory', () => {
      const session = open();
      expect(session.vcpuCount).toBe(VCPUS);
      expect(session.maxPhysicalAddress).toBe(BigInt(MEMORY_BYTES));
    });

    test('works again after a close', () => {
      open().close();
      expect(open().vcpuCount).toBe(VCPUS);
    });

    test('refuses a guest without paging, and detaches from it', () => {
      peer.ask('setSystemRegister', 0, CR0, 0x11n);
      expect(codeOf(open)).toBe('GUEST_UNSUPPORTED');
      peer.ask('disconnected');
    });

    test('refuses a guest with five-level paging, which libvmi takes for four', () => {
      peer.ask('setSystemRegister', 0, CR4, CR4_PAE | CR4_LA57);
      expect(codeOf(open)).toBe('GUEST_UNSUPPORTED');
      peer.ask('disconnected');
    });

    test('says so when no hypervisor connects', async () => {
      await peer.stop();
      expect(codeOf(open)).toBe('ATTACH_FAILED');
      expect(existsSync(socket)).toBe(false);
    });

    test.each([[''], ['a\0b']])('refuses the name %j', (name) => {
      expect(codeOf(() => openSession({ name, socket, libraryPath: path }))).toBe('INVALID_ARGUMENT');
    });

    test('a hypervisor that comes back is not accepted: its restrictions would be lost unnoticed', () => {
      const session = open();
      peer.ask('die');
      expect(codeOf(() => session.listen(PATIENCE_MS))).toBe('HYPERVISOR_GONE');
      expect(existsSync(socket)).toBe(false);
      expect(codeOf(() => session.registers(0))).toBe('HYPERVISOR_GONE');
      expect(peer.ask('connections')).toBe(1);
    });
  });

  describe('physical memory', () => {
    test('is read across page boundaries, at any alignment and length', () => {
      const bytes = Buffer.from(Array.from({ length: MEMORY_BYTES }, (_, i) => (i * 7 + (i >> 8)) & 0xff));
      peer.ask('setMemory', 0, bytes);
      const session = open();
      const range = fc
        .tuple(fc.nat(MEMORY_BYTES), fc.nat(3 * 4096))
        .map(([start, length]) => [start, Math.min(length, MEMORY_BYTES - start)] as const);
      fc.assert(
        fc.property(range, ([start, length]) => {
          const read = session.readPhysical(BigInt(start), length);
          expect(Buffer.compare(read, bytes.subarray(start, start + length))).toBe(0);
        }),
        { numRuns: 50 },
      );
    });

    test('is written across page boundaries, and nothing beside', () => {
      peer.ask('setMemory', 0, Buffer.alloc(MEMORY_BYTES, 0xcc));
      const session = open();
      const bytes = Buffer.from(Array.from({ length: 5000 }, (_, i) => i & 0xff));
      whileQuiescent(session, () => session.writePhysical(0xff0n, bytes));
      const expected = Buffer.alloc(MEMORY_BYTES, 0xcc);
      expected.set(bytes, 0xff0);
      expect(Buffer.compare(peer.ask('memory', 0, MEMORY_BYTES), expected)).toBe(0);
    });

    test.each([
      [BigInt(MEMORY_BYTES), 1],
      [BigInt(MEMORY_BYTES) - 4n, 5],
      [0xffff_ffff_ffff_ffffn, 8],
      [1n << 70n, 8],
      [-8n, 8],
      [0n, -1],
      [0n, 0.5],
      [0n, Number.POSITIVE_INFINITY],
    ])('an impossible range is refused: 0x%s, %s bytes', (gpa, length) => {
      const session = open();
      peer.ask('commands');
      expect(codeOf(() => session.readPhysical(gpa, length))).toBe('HYPERVISOR_FAILED');
      expect(peer.ask('commands')).toEqual([]);
    });

    test('is seen as it is now after the caches were flushed', () => {
      const session = open();
      session.readPhysical(0x5000n, 1);
      peer.ask('setMemory', 0x5000, Buffer.from([0x5a]));
      session.flushCaches();
      expect(session.readPhysical(0x5000n, 1)[0]).toBe(0x5a);
    });

    test('that was refused once is asked for again after the caches were flushed', () => {
      peer.ask('setMemory', 0x5000, Buffer.from([0x5a]));
      const session = open();
      peer.ask('onCommand', { command: Id.readPhysical, action: 'refuse' });
      expect(codeOf(() => session.readPhysical(0x5000n, 1))).toBe('HYPERVISOR_FAILED');
      session.flushCaches();
      expect(session.readPhysical(0x5000n, 1)[0]).toBe(0x5a);
    });

    test('is not written while the guest runs', () => {
      const session = open();
      expect(codeOf(() => session.writePhysical(0n, Buffer.from([1])))).toBe('NOT_QUIESCENT');
      expect(codeOf(() => session.setRegisters(0, session.registers(0)))).toBe('NOT_QUIESCENT');
      expect(peer.ask('memory', 0, 1)[0]).toBe(0);
    });
  });

  describe('translation', () => {
    const PRESENT = 1n;
    const LARGE = 0x80n;
    const ROOT = 0x10000;

    function setEntry(table: number, index: number, value: bigint): void {
      const bytes = Buffer.alloc(8);
      bytes.writeBigUInt64LE(value);
      peer.ask('setMemory', table + index * 8, bytes);
    }

    // 0xffff8000_00000000: a 4 KB page, a 2 MB page at index 1 of the directory, a 1 GB page at index 1 above it.
    beforeEach(() => {
      setEntry(ROOT, 256, 0x11000n | PRESENT);
      setEntry(0x11000, 0, 0x12000n | PRESENT);
      setEntry(0x11000, 1, 0x0n | LARGE | PRESENT);
      setEntry(0x12000, 0, 0x13000n | PRESENT);
      setEntry(0x12000, 1, 0x0n | LARGE | PRESENT);
      setEntry(0x13000, 5, 0x2_7000n | PRESENT | (1n << 63n));
    });

    test.each([
      ['a 4 KB page, its NX bit aside', 0xffff_8000_0000_5123n, 0x2_7123n],
      ['a 2 MB page', 0xffff_8000_0021_2345n, 0x1_2345n],
      ['a 1 GB page', 0xffff_8000_4001_2345n, 0x1_2345n],
      ['nothing at all', 0xffff_8000_0000_6000n, undefined],
      ['an address that is not canonical', 0x0000_8000_0000_5123n, undefined],
      ['an address beyond 64 bits', 0x1_ffff_8000_0000_5123n, undefined],
    ])('finds %s', (_name, gva, expected) => {
      expect(open().translate(BigInt(ROOT), gva)).toBe(expected);
    });

    test('takes a CR3 as it is, with PCID and flag', () => {
      expect(open().translate((1n << 63n) | BigInt(ROOT) | 0x1an, 0xffff_8000_0000_5123n)).toBe(0x2_7123n);
    });

    test('is undefined for a page table outside memory, and the session goes on', () => {
      const session = open();
      expect(session.translate(0x7f_0000_0000n, 0xffff_8000_0000_5123n)).toBe(undefined);
      expect(session.translate(BigInt(ROOT), 0xffff_8000_0000_5123n)).toBe(0x2_7123n);
    });

    test('follows a remapped page after the caches were flushed', () => {
      const session = open();
      session.translate(BigInt(ROOT), 0xffff_8000_0000_5123n);
      setEntry(0x13000, 5, 0x2_8000n | PRESENT);
      session.flushCaches();
      expect(session.translate(BigInt(ROOT), 0xffff_8000_0000_5123n)).toBe(0x2_8123n);
    });
  });

  describe('registers', () => {
    // KVM's own layouts, in the order of their offsets.
    const KVM_REGS = [
      ...(['rax', 'rbx', 'rcx', 'rdx', 'rsi', 'rdi', 'rsp', 'rbp', 'r8', 'r9', 'r10', 'r11'] as const),
      ...(['r12', 'r13', 'r14', 'r15', 'rip', 'rflags'] as const),
    ];
    const KVM_SREGS = [
      ['fsBase', 72],
      ['gsBase', 96],
      ['trBase', 144],
      ['gdtrBase', 192],
      ['idtrBase', 208],
      ['cr2', 232],
      ['cr3', 240],
    ] as const;
    const MSR_LSTAR = 0xc000_0082;

    test('each is read from its own place, all 64 bits of it', () => {
      const session = open();
      const expected: Partial<Registers> = {};
      let value = 0xfedc_ba98_0000_0000n;
      for (const [index, name] of KVM_REGS.entries()) {
        expected[name] = ++value;
        peer.ask('setRegister', 1, index * 8, value);
      }
      for (const [name, offset] of KVM_SREGS) {
        expected[name] = ++value;
        peer.ask('setSystemRegister', 1, offset, value);
      }
      expected.lstar = ++value;
      peer.ask('setMsr', 1, MSR_LSTAR, value);
      expect(session.registers(1)).toMatchObject(expected);
    });

    test('the selectors of CS and SS', () => {
      const session = open();
      peer.ask('setSystemRegister', 0, 8, (0x33n << 32n) | 0xffff_ffffn);
      peer.ask('setSystemRegister', 0, 128, (0x2bn << 32n) | 0xffff_ffffn);
      expect(session.registers(0)).toMatchObject({ cs: 0x33n, ss: 0x2bn });
    });

    test('GPRs, RIP and RFLAGS are set together', () => {
      const session = open();
      const wanted = session.registers(1);
      let value = 0x8000_0000_0000_1000n;
      for (const name of [...GPR_NAMES, 'rip', 'rflags'] as const) wanted[name] = ++value;
      whileQuiescent(session, () => session.setRegisters(1, wanted));
      for (const [index, name] of KVM_REGS.entries()) {
        expect([name, peer.ask('register', 1, index * 8)]).toEqual([name, wanted[name]]);
        expect(peer.ask('register', 0, index * 8)).toBe(0n);
      }
    });

    test.each([-1, VCPUS, 0.5, Number.NaN])('there is no vCPU %s', (vcpu) => {
      const session = open();
      expect(codeOf(() => session.registers(vcpu))).toBe('INVALID_ARGUMENT');
    });
  });

  describe('traps', () => {
    test('a trapped frame is execute-only, a released one as before', () => {
      const session = open();
      session.trapAccess(FRAME);
      expect(peer.ask('access', Number(FRAME))).toBe(EXECUTE_ONLY);
      session.releaseAccess(FRAME);
      expect(peer.ask('access', Number(FRAME))).toBe(ALL_ACCESS);
    });

    test.each([BigInt(FRAMES), -1n, 1n << 60n])('there is no frame %s, and memory does not grow', (gfn) => {
      const session = open();
      expect(codeOf(() => session.trapAccess(gfn))).toBe('HYPERVISOR_FAILED');
      expect(codeOf(() => session.readPhysical(BigInt(MEMORY_BYTES), 1))).toBe('HYPERVISOR_FAILED');
    });
  });

  describe('violations', () => {
    test('tell who accessed what, and with which registers', () => {
      const session = open();
      for (let index = 0; index < 16; index++) {
        peer.ask('setRegister', 1, index * 8, 0xf000_0000_0000_0000n + BigInt(index));
      }
      const seen: unknown[] = [];
      session.onViolation((violation) => {
        const { vcpu, rip, gva, gpa, read, write, execute } = violation;
        seen.push({ vcpu, rip, gva, gpa, read, write, execute });
        seen.push(GPR_NAMES.map((name) => Number(violation.register(name) & 0xffn)));
        return undefined;
      });
      peer.ask('fault', fault({ vcpu: 1 }));
      expect(session.listen(PATIENCE_MS)).toBe(1);
      expect(seen).toEqual([
        {
          vcpu: 1,
          rip: 0xffff_f800_0000_0042n,
          gva: GVA,
          gpa: GPA,
          read: true,
          write: false,
          execute: false,
        },
        // KVM has rbx before rcx, and rsi and rdi before rsp and rbp.
        [0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15],
      ]);
    });

    test.each([
      ['read', READ, { read: true, write: false, execute: false }],
      ['write', WRITE, { read: false, write: true, execute: false }],
      ['read and write', READ | WRITE, { read: true, write: true, execute: false }],
      ['execute, which nobody trapped', EXECUTE, { read: false, write: false, execute: true }],
    ])('a %s is told as such and answered once', (_name, access, expected) => {
      const session = open();
      let seen: Violation | undefined;
      session.onViolation((violation) => {
        seen = violation;
        return undefined;
      });
      peer.ask('fault', fault({ access }));
      expect(session.listen(PATIENCE_MS)).toBe(1);
      expect(seen).toMatchObject(expected);
      expect(peer.ask('answers', 1)).toMatchObject([{ vcpu: 0, action: 0, data: new Uint8Array() }]);
    });

    test('are answered without a handler, and in frames that were never trapped', () => {
      const session = open();
      peer.ask('fault', fault({ gpa: 0x2_0000n }));
      expect(session.listen(PATIENCE_MS)).toBe(1);
      expect(peer.ask('answers', 1)).toHaveLength(1);
    });

    test.each([1, 8, 256])('a read is answered with %s bytes from its address on', (length) => {
      const session = open();
      const data = Uint8Array.from({ length }, (_, i) => i ^ 0xa5);
      session.onViolation(() => data);
      peer.ask('fault', fault());
      session.listen(PATIENCE_MS);
      expect(peer.ask('answers', 1)).toMatchObject([{ dataAddress: GVA, data }]);
    });

    test('the data of one answer does not show in the next', () => {
      const session = open();
      const answers = [Uint8Array.from({ length: 64 }, () => 0xff), Uint8Array.of(1, 2)];
      session.onViolation(() => answers.shift());
      const sent = [1, 2, 3].flatMap(() => {
        peer.ask('fault', fault());
        session.listen(PATIENCE_MS);
        return peer.ask('answers', 1).map(({ data }) => [...data]);
      });
      expect(sent).toEqual([Array.from({ length: 64 }, () => 0xff), [1, 2], []]);
    });

    test.each([0, 257, 10_000])('an answer of %s bytes is refused, and the vCPU goes on', (length) => {
      const session = open();
      session.onViolation(() => new Uint8Array(length));
      peer.ask('fault', fault());
      expect(codeOf(() => session.listen(PATIENCE_MS))).toBe('INVALID_ARGUMENT');
      peer.ask('running');
    });

    test('of all vCPUs are answered', () => {
      const session = open();
      for (let vcpu = 0; vcpu < VCPUS; vcpu++) peer.ask('fault', fault({ vcpu }));
      let answered = 0;
      while (answered < VCPUS) answered += session.listen(PATIENCE_MS);
      expect(peer.ask('answers', VCPUS).map(({ vcpu }) => vcpu)).toEqual([0, 1]);
    });

    test('an exception in the handler leaves no vCPU frozen and comes out of listen, once', () => {
      const session = open();
      const failure = new Error('in the handler');
      session.onViolation(() => {
        throw failure;
      });
      peer.ask('fault', fault());
      expect(() => session.listen(PATIENCE_MS)).toThrow(failure);
      expect(peer.ask('answers', 1)).toMatchObject([{ action: 0, data: new Uint8Array() }]);
      expect(session.listen(0)).toBe(0);
    });

    test('memory, translations and registers can be read inside the handler', () => {
      peer.ask('setMemory', 0x4000, Buffer.from([0x77]));
      const session = open();
      const seen: unknown[] = [];
      session.onViolation((violation) => {
        seen.push(session.readPhysical(0x4000n, 1)[0], session.translate(0n, GVA), session.registers(1).cr0);
        seen.push(violation.register('rax'));
        return undefined;
      });
      peer.ask('setRegister', 0, 0, 0x99n);
      peer.ask('fault', fault());
      session.listen(PATIENCE_MS);
      expect(seen).toEqual([0x77, undefined, 0x8005_0033n, 0x99n]);
    });

    test.each<[string, (session: LibvmiSession) => unknown]>([
      ['resume', (session) => session.resume()],
      ['pause', (session) => session.pause()],
      ['listen', (session) => session.listen(0)],
      ['close', (session) => session.close()],
      ['writePhysical', (session) => session.writePhysical(0n, Buffer.from([1]))],
      ['setRegisters', (session) => session.setRegisters(0, session.registers(0))],
    ])('%s is refused inside the handler, where it would hang or race', (_name, method) => {
      const session = open();
      session.onViolation(() => {
        method(session);
        return undefined;
      });
      peer.ask('fault', fault());
      session.pause();
      expect(codeOf(() => session.listen(PATIENCE_MS))).toBe('NOT_QUIESCENT');
      session.resume();
      peer.ask('running');
    });

    test('a register cannot be read once the violation is answered: its memory is gone', () => {
      const session = open();
      let kept: Violation | undefined;
      session.onViolation((violation) => {
        kept = violation;
        return Uint8Array.of(1);
      });
      peer.ask('fault', fault());
      session.listen(PATIENCE_MS);
      expect(codeOf(() => kept?.register('rax'))).toBe('INVALID_ARGUMENT');
      expect(kept?.rip).toBe(0xffff_f800_0000_0042n);
    });

    test('what the library points to stays in place while garbage is collected, also inside the handler', () => {
      setFlagsFromString('--expose-gc');
      const collect = runInNewContext('gc') as () => void;
      const session = open();
      const data = Uint8Array.from({ length: 256 }, (_, i) => i ^ 0x5a);
      session.onViolation((violation) => {
        collect();
        return violation.register('rax') === 0x77n ? data : undefined;
      });
      peer.ask('setRegister', 0, 0, 0x77n);
      for (let round = 0; round < 4; round++) {
        collect();
        // What was freed is used again.
        const garbage = Array.from({ length: 200 }, () => new Uint8Array(128).fill(0xff));
        peer.ask('fault', fault());
        expect(session.listen(PATIENCE_MS)).toBe(1);
        expect(garbage).toHaveLength(200);
        expect(peer.ask('answers', 1)).toMatchObject([{ dataAddress: GVA, data }]);
      }
    });

    test('a single step that nobody asked for is answered', () => {
      const session = open();
      peer.ask('event', 1, EventId.singleStep, new Uint8Array(8));
      expect(session.listen(PATIENCE_MS)).toBe(1);
      peer.ask('running');
    });

    test.each([-1, 0.5, 2 ** 31, Number.NaN])('%s is not a timeout', (timeout) => {
      const session = open();
      expect(codeOf(() => session.listen(timeout))).toBe('INVALID_ARGUMENT');
    });

    test('a watchdog sees which call it is in', () => {
      const heartbeat = createHeartbeat();
      opened = openSession({ name: 'guest', socket, libraryPath: path, heartbeat });
      const stuck: MemtablesError[] = [];
      const watchdog = new Watchdog(heartbeat, { limitMs: 1000 }, (error) => stuck.push(error));
      watchdog.stop();
      opened.onViolation(() => {
        watchdog.look(0);
        watchdog.look(1_000_000);
        return undefined;
      });
      peer.ask('fault', fault());
      opened.listen(PATIENCE_MS);
      watchdog.look(2_000_000);
      watchdog.look(9_000_000);
      expect(stuck.map(({ code, context }) => [code, context.call])).toEqual([
        ['HYPERVISOR_STUCK', 'vmi_events_listen'],
      ]);
    });
  });

  describe('pausing', () => {
    test('is counted', () => {
      const session = open();
      session.pause();
      session.pause();
      session.resume();
      session.writePhysical(0n, Buffer.from([1]));
      expect(peer.ask('paused')).toEqual([true, true]);
      session.resume();
      peer.ask('running');
      expect(codeOf(() => session.resume())).toBe('INVALID_ARGUMENT');
    });

    test('a violation that was under way is answered inside resume, and what its handler throws comes out', () => {
      const session = open();
      const failure = new Error('in the handler');
      session.onViolation(() => {
        throw failure;
      });
      peer.ask('onCommand', { command: Id.pauseVcpu, vcpu: 1, action: fault({ vcpu: 1 }) });
      session.pause();
      expect(() => session.resume()).toThrow(failure);
      peer.ask('running');
      expect(peer.ask('answers', 1)).toHaveLength(1);
      expect(codeOf(() => session.resume())).toBe('INVALID_ARGUMENT');
    });

    test('the guest is quiescent only once a violation that came late has been answered', () => {
      const session = open();
      const order: string[] = [];
      session.onViolation(() => {
        order.push('violation');
        return undefined;
      });
      peer.ask('onCommand', { command: Id.pauseVcpu, vcpu: 1, action: fault({ vcpu: 1 }) });
      whileQuiescent(session, () => order.push('work'));
      expect(order).toEqual(['violation', 'work']);
      peer.ask('running');
    });
  });

  describe('a hypervisor that goes away', () => {
    const everyCall: [string, (session: LibvmiSession) => unknown][] = [
      ['readPhysical', (session) => session.readPhysical(0x9000n, 1)],
      ['writePhysical', (session) => session.writePhysical(0n, Buffer.from([1]))],
      ['translate', (session) => session.translate(0x9000n, GVA)],
      ['flushCaches', (session) => session.flushCaches()],
      ['registers', (session) => session.registers(0)],
      ['pause', (session) => session.pause()],
      ['resume', (session) => session.resume()],
      ['trapAccess', (session) => session.trapAccess(FRAME)],
      ['releaseAccess', (session) => session.releaseAccess(FRAME)],
      ['listen', (session) => session.listen(PATIENCE_MS)],
    ];

    function expectGone(session: LibvmiSession): void {
      for (const [name, call] of everyCall) {
        expect([name, codeOf(() => call(session))]).toEqual([name, 'HYPERVISOR_GONE']);
      }
      expect(codeOf(() => session.close())).toBe('nothing thrown');
    }

    test('during listen', () => {
      const session = open();
      peer.ask('dieIn', 50);
      expect(codeOf(() => session.listen(PATIENCE_MS))).toBe('HYPERVISOR_GONE');
      expectGone(session);
    });

    test.each<[string, number, (session: LibvmiSession) => unknown]>([
      ['a read', Id.readPhysical, (session) => session.readPhysical(0x9000n, 1)],
      ['a translation', Id.readPhysical, (session) => session.translate(0x9000n, GVA)],
      ['a register read', Id.getRegisters, (session) => session.registers(0)],
      ['trapping', Id.setPageAccess, (session) => session.trapAccess(FRAME)],
      ['releasing', Id.setPageAccess, (session) => session.releaseAccess(FRAME)],
      ['pausing', Id.pauseVcpu, (session) => session.pause()],
      ['the end of pausing', Id.controlCommandResponse, (session) => session.pause()],
      [
        'a write',
        Id.writePhysical,
        (session) => whileQuiescent(session, () => session.writePhysical(0n, Buffer.from([1]))),
      ],
      [
        'setting registers',
        Id.setRegisters,
        (session) => whileQuiescent(session, () => session.setRegisters(0, session.registers(0))),
      ],
    ])('during %s', (_name, command, call) => {
      const session = open();
      peer.ask('onCommand', { command, action: 'die' });
      expect(codeOf(() => call(session))).toBe('HYPERVISOR_GONE');
      expectGone(session);
    });

    test('during resuming, which it does not confirm: the next call says so', () => {
      const session = open();
      session.pause();
      peer.ask('onCommand', { command: Id.eventReply, action: 'die' });
      expect(codeOf(() => session.resume())).toMatch(/^(nothing thrown|HYPERVISOR_GONE)$/);
      peer.ask('disconnected');
      expectGone(session);
    });

    test('between pause and resume', () => {
      const session = open();
      session.pause();
      peer.ask('die');
      expect(codeOf(() => session.resume())).toBe('HYPERVISOR_GONE');
      expectGone(session);
    });

    test('while quiescent work is done', () => {
      const session = open();
      const work = () =>
        whileQuiescent(session, () => {
          peer.ask('die');
          session.readPhysical(0x9000n, 1);
        });
      expect(codeOf(work)).toBe('HYPERVISOR_GONE');
      expectGone(session);
    });

    test('inside the handler', () => {
      const session = open();
      peer.ask('onCommand', { command: Id.readPhysical, action: 'die' });
      session.onViolation(() => session.readPhysical(0x9000n, 1));
      peer.ask('fault', fault());
      expect(codeOf(() => session.listen(PATIENCE_MS))).toBe('HYPERVISOR_GONE');
      expectGone(session);
    });

    test('with a violation unanswered', () => {
      const session = open();
      peer.ask('fault', fault());
      peer.ask('die');
      expect(codeOf(() => session.listen(0))).toMatch(/nothing thrown|HYPERVISOR_GONE/);
      expect(codeOf(() => session.listen(PATIENCE_MS))).toBe('HYPERVISOR_GONE');
      expectGone(session);
    });

    test.each([
      ['gives permissions back', Id.setPageAccess],
      ['drains', Id.getRegisters],
      ['pauses the guest', Id.pauseVcpu],
      ['switches events off', Id.controlEvents],
      ['lets the guest go on', Id.eventReply],
    ])('while a session that closes %s', (_name, command) => {
      const session = open();
      session.trapAccess(FRAME);
      peer.ask('onCommand', { command, action: 'die' });
      expect(codeOf(() => session.close())).toBe('nothing thrown');
      peer.ask('disconnected');
      expectGone(session);
    });

    test.each([
      ['tells its vCPUs', Id.getGuestInfo],
      ['switches events on', Id.controlEvents],
      ['tells the size of memory', Id.getMaxGfn],
      ['tells the paging mode', Id.getRegisters],
    ])('while it %s, and one that comes then is attached to', (_name, command) => {
      peer.ask('onCommand', { command, action: 'die' });
      expect(codeOf(open)).toMatch(/^(ATTACH_FAILED|HYPERVISOR_GONE)$/);
      expect(existsSync(socket)).toBe(false);
      expect(open().vcpuCount).toBe(VCPUS);
    });

    test('before it has told its version: the next one that comes is attached to', () => {
      peer.ask('onCommand', { command: Id.getVersion, action: 'die' });
      expect(open().vcpuCount).toBe(VCPUS);
    });

    test('in effect, by refusing everything, is left at once', () => {
      const session = open();
      peer.ask('onCommand', { command: Id.readPhysical, action: 'refuse' });
      peer.ask('onCommand', { command: Id.getRegisters, action: 'refuse' });
      expect(codeOf(() => session.readPhysical(0x9000n, 1))).toBe('HYPERVISOR_GONE');
      peer.ask('disconnected');
      expectGone(session);
    });
  });

  describe('closing', () => {
    test('gives every frame its permissions back', () => {
      const session = open();
      for (const gfn of [FRAME, 9n, 11n]) session.trapAccess(gfn);
      session.close();
      peer.ask('disconnected');
      expect([3, 9, 11].map((gfn) => peer.ask('access', gfn))).toEqual([7, 7, 7]);
    });

    test('answers what is outstanding, also what is raised meanwhile, with the handler', () => {
      const session = open();
      session.trapAccess(FRAME);
      const data = Uint8Array.of(1, 2, 3, 4);
      session.onViolation(() => data);
      peer.ask('fault', fault());
      peer.ask('onCommand', { command: Id.setPageAccess, action: fault({ vcpu: 1 }) });
      session.close();
      peer.ask('disconnected');
      expect(peer.ask('answers', 2)).toMatchObject([{ data }, { data }]);
      expect(peer.ask('outstanding')).toBe(0);
    });

    test('lets a paused guest run', () => {
      const session = open();
      session.pause();
      session.pause();
      session.close();
      peer.ask('disconnected');
      expect(peer.ask('outstanding')).toBe(0);
    });

    test('finishes before an exception of the handler comes out', () => {
      const session = open();
      session.trapAccess(FRAME);
      session.onViolation(() => {
        throw new Error('in the handler');
      });
      peer.ask('fault', fault());
      expect(() => session.close()).toThrow('in the handler');
      peer.ask('disconnected');
      expect(peer.ask('access', Number(FRAME))).toBe(ALL_ACCESS);
      expect(peer.ask('outstanding')).toBe(0);
    });

    test('twice is as good as once', () => {
      const session = open();
      session.close();
      session.close();
      peer.ask('disconnected');
    });

    test('leaves a session that refuses everything', () => {
      const session = open();
      session.close();
      expect(codeOf(() => session.listen(0))).toBe('HYPERVISOR_GONE');
      expect(codeOf(() => session.readPhysical(0n, 1))).toBe('HYPERVISOR_GONE');
      expect(codeOf(() => session.trapAccess(FRAME))).toBe('HYPERVISOR_GONE');
    });
  });
});
