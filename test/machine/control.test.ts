// Pausing, setting registers, several vCPUs and machines, wrong arguments.
import { once } from 'node:events';
import { type AddressInfo, connect, createServer } from 'node:net';
import { setImmediate as eventLoopRound } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createMachine } from '../../src/machine/create-machine.js';
import { ACCESS_EXECUTE, type Machine } from '../../src/machine/machine.js';
import { CODE, createFlatMachine, DATA, hexBytes, setAccess } from './support.js';

/** inc rax; jmp */
const COUNT = hexBytes('48ffc0 ebfb');

let machine: Machine;
beforeEach(() => {
  machine = createFlatMachine({ vcpus: 2 });
});
afterEach(() => machine.close());

function count(vcpu: number): void {
  machine.writePhysical(CODE, COUNT);
  machine.setRegisters(vcpu, { rip: CODE, rax: 0n });
}

function counted(vcpu: number): bigint {
  return machine.registers(vcpu).rax;
}

describe('a long run', () => {
  it('ends after the turn of one vCPU when there is something to be read on this thread', async () => {
    const server = createServer().listen(0, '127.0.0.1');
    await once(server, 'listening');
    const client = connect((server.address() as AddressInfo).port);
    const [peer] = await once(server, 'connection');
    try {
      const received = once(peer, 'data');
      await eventLoopRound();
      client.write('x');
      count(0);
      expect(machine.run(200_000, true)).toEqual({ traps: [], idle: false });
      const turn = counted(0);
      expect(turn).toBeGreaterThan(0n);
      machine.run(200_000);
      expect(counted(0)).toBeGreaterThan(3n * turn);
      expect(String(await received)).toBe('x');
    } finally {
      client.destroy();
      peer.destroy();
      server.close();
    }
  });
});

describe('a paused vCPU', () => {
  it('runs no instruction, whoever else runs, until it was resumed as often as paused', () => {
    count(0);
    count(1);
    machine.pause(0);
    machine.pause(0);
    machine.run(1000);
    expect(machine.step(0, 100)).toEqual({ retired: 0 });
    expect(counted(0)).toBe(0n);
    expect(counted(1)).toBeGreaterThan(0n);
    machine.resume(0);
    expect(machine.step(0, 100)).toEqual({ retired: 0 });
    machine.resume(0);
    expect(machine.step(0, 100).retired).toBe(100);
    expect(counted(0)).toBe(50n);
  });

  it('is no reason to be idle unless all are', () => {
    count(0);
    count(1);
    machine.pause(0);
    expect(machine.run(100).idle).toBe(false);
    machine.pause(1);
    expect(machine.run(100_000)).toEqual({ traps: [], idle: true });
  });

  it('has exact registers, and takes new ones at once', () => {
    count(0);
    machine.run(1000);
    machine.pause(0);
    const { rip } = machine.registers(0);
    expect([CODE, CODE + 3n]).toContain(rip);
    machine.setRegisters(0, { rax: 5n, rip: CODE });
    expect(machine.registers(0)).toMatchObject({ rax: 5n, rip: CODE });
    machine.resume(0);
    machine.step(0, 2);
    expect(counted(0)).toBe(6n);
  });

  it('cannot be resumed more often than it was paused', () => {
    machine.pause(0);
    machine.resume(0);
    expect(() => machine.resume(0)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
  });
});

describe('registers', () => {
  it('begin with every SSE exception masked', () => {
    // stmxcsr [rbx]
    machine.writePhysical(CODE, hexBytes('0fae1b'));
    machine.setRegisters(0, { rip: CODE, rbx: DATA });
    machine.step(0, 1);
    expect(machine.readPhysical(DATA, 4).readUInt32LE()).toBe(0x1f80);
  });

  it('are all that were set, and no others change', () => {
    const before = machine.registers(1);
    const set = {
      rax: 1n,
      r15: (1n << 64n) - 1n,
      rip: DATA,
      rflags: 0x8d7n,
      fsBase: 0x7fff_0000_0000n,
      gsBase: 5n,
      shadowGs: 7n,
      lstar: 9n,
      cr2: 11n,
    };
    machine.setRegisters(1, set);
    expect(machine.registers(1)).toEqual({ ...before, ...set });
    expect(machine.readMsr(1, 0xc0000082)).toBe(9n);
    expect(machine.readMsr(1, 0xc0000102)).toBe(7n);
    expect(machine.registers(0).rax).toBe(0n);
  });

  it('set while a trap is open count after the instruction, over what it has written', () => {
    machine.writePhysical(CODE, hexBytes('488b03 f4'));
    machine.writePhysical(DATA, hexBytes('0102030405060708'));
    setAccess(machine, DATA, 1, ACCESS_EXECUTE);
    machine.setRegisters(0, { rip: CODE, rbx: DATA, rcx: 1n });
    machine.step(0, 1);
    machine.setRegisters(0, { rbx: 7n, rcx: 2n });
    machine.setRegisters(0, { rcx: 3n });
    // Not yet.
    expect(machine.registers(0)).toMatchObject({ rip: CODE, rbx: DATA, rcx: 1n });
    machine.complete(0);
    expect(machine.registers(0)).toMatchObject({
      rip: CODE + 3n,
      rax: 0x0807060504030201n,
      rbx: 7n,
      rcx: 3n,
    });

    machine.setRegisters(0, { rip: CODE, rbx: DATA });
    machine.step(0, 1);
    machine.setRegisters(0, { rax: 5n, rip: DATA + 0x100n });
    machine.complete(0);
    expect(machine.registers(0)).toMatchObject({ rip: DATA + 0x100n, rax: 5n });
  });

  it('set while a trap is open count on a retry too', () => {
    machine.writePhysical(CODE, hexBytes('488b03 f4'));
    setAccess(machine, DATA, 1, ACCESS_EXECUTE);
    machine.setRegisters(0, { rip: CODE, rbx: DATA });
    machine.step(0, 1);
    machine.setRegisters(0, { rip: CODE + 3n });
    machine.retry(0);
    expect(machine.step(0, 5)).toEqual({ retired: 1 });
  });

  it('another RIP wakes a halted vCPU, the same or none does not', () => {
    machine.writePhysical(CODE, hexBytes('f4 90 f4'));
    machine.setRegisters(0, { rip: CODE });
    expect(machine.step(0, 5)).toEqual({ retired: 1 });
    machine.setRegisters(0, { rip: CODE + 1n, rax: 1n });
    expect(machine.step(0, 5)).toEqual({ retired: 0 });
    machine.setRegisters(0, { rip: CODE });
    expect(machine.step(0, 5)).toEqual({ retired: 1 });
  });
});

describe('an open trap', () => {
  beforeEach(() => {
    machine.writePhysical(CODE, hexBytes('488b03 ebfb'));
    setAccess(machine, DATA, 1, ACCESS_EXECUTE);
    machine.setRegisters(0, { rip: CODE, rbx: DATA });
    expect(machine.run(10_000).traps).toHaveLength(1);
  });

  it('keeps its vCPU where it is, and the others running', () => {
    machine.setRegisters(1, { rip: CODE, rbx: CODE, rcx: 0n });
    expect(machine.run(1000)).toEqual({ traps: [], idle: false });
    expect(machine.step(0, 10)).toEqual({ retired: 0 });
    expect(machine.registers(0).rip).toBe(CODE);
  });

  it('may be completed while the vCPU is paused, which then does nothing more', () => {
    machine.pause(0);
    machine.complete(0);
    machine.run(1000);
    expect(machine.registers(0).rip).toBe(CODE + 3n);
  });

  it('is completed once', () => {
    machine.complete(0);
    for (const again of [() => machine.complete(0), () => machine.retry(0), () => machine.complete(1)]) {
      expect(again).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    }
  });

  it('does not outlive its machine, and close is enough', () => {
    machine.close();
    machine.close();
    for (const use of [
      () => machine.complete(0),
      () => machine.run(1),
      () => machine.step(0, 1),
      () => machine.registers(0),
      () => machine.readPhysical(0n, 1),
      () => machine.takeConsole(),
    ]) {
      expect(use).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    }
  });
});

describe('step', () => {
  it('retires exactly as many instructions as asked, and is the same in any portions', () => {
    count(0);
    expect(machine.step(0, 1001).retired).toBe(1001);
    expect(machine.registers(0)).toMatchObject({ rax: 501n, rip: CODE + 3n });
    count(0);
    for (const portion of [1, 0, 499, 501]) expect(machine.step(0, portion).retired).toBe(portion);
    expect(machine.registers(0)).toMatchObject({ rax: 501n, rip: CODE + 3n });
  });

  it('says how many had retired before a trap, and before a halt', () => {
    machine.writePhysical(CODE, hexBytes('90 90 488b03 90 f4 90'));
    setAccess(machine, DATA, 1, ACCESS_EXECUTE);
    machine.setRegisters(0, { rip: CODE, rbx: DATA });
    expect(machine.step(0, 100)).toMatchObject({ retired: 2, trap: { rip: CODE + 2n } });
    machine.complete(0);
    expect(machine.step(0, 100)).toEqual({ retired: 2 });
  });

  it('makes RDTSC count instructions, so that nothing depends on the wall clock', () => {
    // rdtsc; shl rdx, 32; or rax, rdx; hlt
    machine.writePhysical(CODE, hexBytes('0f31 48c1e220 4809d0 f4'));
    const read = () => {
      machine.setRegisters(0, { rip: CODE });
      machine.step(0, 4);
      return machine.registers(0).rax;
    };
    const first = read();
    expect([read(), read()]).toEqual([first + 4n, first + 8n]);
  });
});

it('two machines have nothing in common, used in turn', () => {
  const other = createFlatMachine({ vcpus: 1 });
  count(0);
  other.writePhysical(CODE, hexBytes('48ffc8 ebfb'));
  other.setRegisters(0, { rip: CODE, rax: 0n });
  for (let turn = 0; turn < 5; turn++) {
    machine.step(0, 10);
    other.step(0, 10);
  }
  setAccess(other, DATA, 1, 0);
  expect(machine.access(DATA >> 12n)).toBe(7);
  expect(counted(0)).toBe(25n);
  other.close();
  expect(machine.step(0, 10).retired).toBe(10);
  expect(counted(0)).toBe(30n);
});

it('the guest’s console is taken once, and does not grow without end', () => {
  // loop: out 0xe9, al; jmp loop
  machine.writePhysical(CODE, hexBytes('e6e9 ebfc'));
  machine.setRegisters(0, { rip: CODE, rax: 0x41n });
  machine.step(0, 5);
  expect(machine.takeConsole()).toBe('AAA');
  expect(machine.takeConsole()).toBe('');
  // out to another port, and a port read: all ones
  machine.writePhysical(CODE, hexBytes('e680 e480 f4'));
  machine.setRegisters(0, { rip: CODE, rax: 0n });
  machine.step(0, 3);
  expect(machine.takeConsole()).toBe('');
  expect(machine.registers(0).rax).toBe(0xffn);
  // mov ecx, 3 million; loop: out 0xe9, al; dec ecx; jnz loop; hlt
  machine.writePhysical(CODE, hexBytes('b9c0c62d00 e6e9 ffc9 75fa f4'));
  machine.setRegisters(0, { rip: CODE });
  while (!machine.run(100_000).idle);
  expect(machine.takeConsole().length).toBe(1 << 20);
});

describe('a wrong argument is refused as one, and changes nothing', () => {
  const END = 16n << 20n;
  it.each<[string, () => unknown]>([
    ['no vCPU', () => createMachine({ vcpus: 0, memoryBytes: 4096 })],
    ['too many vCPUs', () => createMachine({ vcpus: 33, memoryBytes: 4096 })],
    ['half a vCPU', () => createMachine({ vcpus: 1.5, memoryBytes: 4096 })],
    ['no memory', () => createMachine({ vcpus: 1, memoryBytes: 0 })],
    ['half a frame', () => createMachine({ vcpus: 1, memoryBytes: 6144 })],
    ['more memory than there is', () => createMachine({ vcpus: 1, memoryBytes: 2 ** 50 })],
    ['a vCPU that is not', () => machine.registers(2)],
    ['a negative vCPU', () => machine.pause(-1)],
    ['a read behind the end', () => machine.readPhysical(END - 1n, 2)],
    ['a read whose end overflows', () => machine.readPhysical((1n << 64n) - 1n, 2)],
    ['a read at a negative address', () => machine.readPhysical(-1n, 1)],
    ['a read of a negative length', () => machine.readPhysical(0n, -1)],
    ['a write behind the end', () => machine.writePhysical(END - 1n, Buffer.alloc(2))],
    ['a write that is no bytes', () => machine.writePhysical(0n, [1, 2] as unknown as Uint8Array)],
    ['the frame behind the last', () => machine.setAccess(END >> 12n, 7)],
    ['the access of a frame that overflows', () => machine.access(1n << 60n)],
    ['an access of more bits', () => machine.setAccess(0n, 8)],
    ['another privilege level', () => machine.setRegisters(0, { cs: 0x33n })],
    ['a vector of nine bits', () => machine.raiseInterrupt(0, 256)],
    ['a negative time', () => machine.run(-1)],
    ['a fraction of a microsecond', () => machine.run(0.5)],
    ['no number', () => machine.run(Number.NaN)],
    ['a negative count', () => machine.step(0, -1)],
    ['a trap that is not', () => machine.complete(0)],
    ['a retry of nothing', () => machine.retry(9)],
  ])('%s', (_, use) => {
    expect(use).toThrow(expect.objectContaining({ name: 'MemtablesError', code: 'INVALID_ARGUMENT' }));
    expect(machine.access(0n)).toBe(7);
    expect(machine.readPhysical(END - 1n, 1)).toEqual(Buffer.alloc(1));
  });

  it('though nothing at the very end is fine', () => {
    expect(machine.readPhysical(END, 0)).toEqual(Buffer.alloc(0));
    machine.writePhysical(END, Buffer.alloc(0));
    machine.writePhysical(END - 1n, Buffer.of(7));
    expect(machine.readPhysical(END - 1n, 1)).toEqual(Buffer.of(7));
  });
});
