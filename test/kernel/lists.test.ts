import { describe, expect, it } from 'vitest';
import { discoverKernel } from '../../src/nt/kernel.js';
import { walkList } from '../../src/nt/list.js';
import { loadedModules } from '../../src/nt/modules.js';
import { processes } from '../../src/nt/processes.js';
import { findProcessor } from '../../src/nt/processors.js';
import { parseProfile } from '../../src/nt/profile.js';
import { checkedStack, savedStackPointer, threads } from '../../src/nt/threads.js';
import { FakeGuest, IMAGE_SIZE, profile, profileText, State } from './fake-guest.js';

const broken = expect.objectContaining({ name: 'MemtablesError', code: 'GUEST_STRUCTURE_INVALID' });
const unmapped = expect.objectContaining({ name: 'MemtablesError', code: 'GUEST_MEMORY_UNMAPPED' });

function guestWithProcesses() {
  const guest = new FakeGuest();
  const second = guest.addProcess('a.exe', 8n);
  const third = guest.addProcess('a-name-as-long-as-it-gets', 12n);
  const links = guest.offset('_EPROCESS', 'ActiveProcessLinks');
  return {
    guest,
    kernel: discoverKernel(guest, profile),
    entries: [guest.system, second, third].map((p) => p + links),
  };
}

describe('the list of processes', () => {
  it('gives every process with its id and name', () => {
    const { kernel } = guestWithProcesses();
    expect([...processes(kernel)].map(({ pid, name }) => [pid, name])).toEqual([
      [4n, 'System'],
      [8n, 'a.exe'],
      [12n, 'a-name-as-long-'],
    ]);
  });

  it('is refused when a loop misses the head', () => {
    const { guest, kernel, entries } = guestWithProcesses();
    guest.write64(entries[2]!, entries[1]!);
    expect(() => [...processes(kernel)]).toThrow(broken);
  });

  it('is refused when an entry leads to itself', () => {
    const { guest, kernel, entries } = guestWithProcesses();
    guest.write64(entries[1]!, entries[1]!);
    expect(() => [...processes(kernel)]).toThrow(broken);
  });

  it('is refused when an entry was unlinked in one direction only', () => {
    const { guest, kernel, entries } = guestWithProcesses();
    guest.write64(entries[0]!, entries[2]!);
    expect(() => [...processes(kernel)]).toThrow(broken);
  });

  it('is refused when its last entry was cut off', () => {
    const { guest, kernel, entries } = guestWithProcesses();
    guest.write64(entries[1]!, guest.symbol('PsActiveProcessHead'));
    expect(() => [...processes(kernel)]).toThrow(broken);
  });

  it('is refused when it is absurdly long', () => {
    const { guest, kernel, entries } = guestWithProcesses();
    const walk = (max: number) => [
      ...walkList(kernel.memory, guest.symbol('PsActiveProcessHead'), max, 'processes'),
    ];
    expect(walk(3)).toEqual(entries);
    expect(() => walk(2)).toThrow(broken);
  });

  it.each([0n, 0x41414141n, 0x1234_5678_0000_0000n])('is refused when a link is %s', (link) => {
    const { guest, kernel, entries } = guestWithProcesses();
    guest.write64(entries[1]!, link);
    expect(() => [...processes(kernel)]).toThrow(broken);
  });

  it('is refused when a link leads to memory that is not there', () => {
    const { guest, kernel, entries } = guestWithProcesses();
    guest.write64(entries[1]!, 0xffff_ae77_0000_0000n);
    expect(() => [...processes(kernel)]).toThrow(unmapped);
  });
});

describe('the threads of a process', () => {
  const guestWithThreads = () => {
    const guest = new FakeGuest();
    const waiting = guest.addThread(guest.system);
    const ready = guest.addThread(guest.system, { state: State.Ready });
    const kernel = discoverKernel(guest, profile);
    return { guest, kernel, waiting, ready, list: () => [...threads(kernel, [...processes(kernel)][0]!)] };
  };

  it('come with their ids, states and stacks', () => {
    const { waiting, ready, list } = guestWithThreads();
    const [first, second] = list();
    expect(first).toMatchObject({
      gva: waiting.gva,
      state: State.Waiting,
      stackBase: waiting.base,
      stackLimit: waiting.limit,
      kernelStack: waiting.base - 0x400n,
    });
    expect(second).toMatchObject({ gva: ready.gva, state: State.Ready });
    expect(second!.tid).not.toBe(first!.tid);
    expect(savedStackPointer(first!)).toBe(waiting.base - 0x400n);
  });

  it('are refused when one belongs to another process', () => {
    const { guest, ready, list } = guestWithThreads();
    guest.set(ready.gva, '_KTHREAD', 'Process', guest.addProcess('b.exe', 16n));
    expect(list).toThrow(broken);
  });

  it.each([
    ['stack bounds the wrong way round', 'StackLimit', 0x10_0000n],
    ['a stack of a megabyte', 'StackLimit', -0x10_0000n],
    ['an empty stack', 'StackLimit', 0x6000n],
    ['a stack base that is not aligned', 'StackBase', 0x6004n],
  ] as const)('are refused with %s', (_, field, distance) => {
    const { guest, waiting, list } = guestWithThreads();
    guest.set(waiting.gva, '_KTHREAD', field, waiting.limit + distance);
    expect(() => checkedStack(list()[0]!)).toThrow(broken);
  });

  it.each([-8n, 0x6008n])('are refused with a saved stack pointer %s from the limit', (distance) => {
    const { guest, waiting, list } = guestWithThreads();
    guest.set(waiting.gva, '_KTHREAD', 'KernelStack', waiting.limit + distance);
    expect(() => savedStackPointer(list()[0]!)).toThrow(broken);
  });

  it('are refused with a stack in user space', () => {
    const { guest, waiting, list } = guestWithThreads();
    guest.set(waiting.gva, '_KTHREAD', 'StackLimit', 0x1_0000n);
    guest.set(waiting.gva, '_KTHREAD', 'StackBase', 0x1_6000n);
    expect(() => checkedStack(list()[0]!)).toThrow(broken);
  });
});

describe('the list of loaded modules', () => {
  const DRIVER = 0xffff_f804_3000_0000n;
  const entryField = (guest: FakeGuest, entry: bigint, field: string) =>
    entry + guest.offset('_KLDR_DATA_TABLE_ENTRY', field);

  function guestWithModules() {
    const guest = new FakeGuest();
    guest.addModule('ntoskrnl.exe', guest.base, IMAGE_SIZE);
    const driver = guest.addModule('dri ver.sys', DRIVER, 0x5000);
    const last = guest.addModule('last.sys', DRIVER + 0x10_0000n, 0x1000);
    const list = (of = profile) => [...loadedModules(discoverKernel(guest, of))];
    return { guest, driver, last, list };
  }

  it('gives every module with its name and place', () => {
    const { guest, list } = guestWithModules();
    expect(list()).toEqual([
      { name: 'ntoskrnl.exe', base: guest.base, size: IMAGE_SIZE },
      { name: 'dri ver.sys', base: DRIVER, size: 0x5000 },
      { name: 'last.sys', base: DRIVER + 0x10_0000n, size: 0x1000 },
    ]);
  });

  it("is read with the loader's type where the profile has no other", () => {
    const { list } = guestWithModules();
    const renamed = profileText().replace('_KLDR_DATA_TABLE_ENTRY', '_LDR_DATA_TABLE_ENTRY');
    expect(list(parseProfile(renamed, 'test'))).toHaveLength(3);
  });

  it('is empty for a profile that does not know it', () => {
    const { list } = guestWithModules();
    const without = profileText(({ symbols }) => delete symbols.PsLoadedModuleList);
    expect(list(parseProfile(without, 'test'))).toEqual([]);
  });

  it.each([
    ['a base in user space', 'DllBase', 0x40_0000n],
    ['a base inside a page', 'DllBase', DRIVER + 1n],
    ['no size', 'SizeOfImage', 0n],
    ['an absurd size', 'SizeOfImage', 0xffff_ffffn],
    ['an end behind the last address', 'DllBase', 0xffff_ffff_ffff_f000n],
  ] as const)('leaves out a module with %s', (_, field, value) => {
    const { guest, driver, list } = guestWithModules();
    guest.write64(entryField(guest, driver, field), value);
    expect(list().map(({ name }) => name)).toEqual(['ntoskrnl.exe', 'last.sys']);
  });

  it.each([
    ['is not in memory', 0xffff_ae77_0000_0000n, 8n],
    ['lies in user space', 0x40_0000n, 8n],
    ['is absurdly long', undefined, 0xfffen],
  ])('gives a module no name when that %s', (_, buffer, length) => {
    const { guest, driver, list } = guestWithModules();
    const name = entryField(guest, driver, 'BaseDllName');
    guest.write64(name, length);
    if (buffer !== undefined) guest.write64(name + 8n, buffer);
    expect(list()[1]).toEqual({ name: '', base: DRIVER, size: 0x5000 });
  });

  it('shows no control characters of a name', () => {
    const { guest, driver, list } = guestWithModules();
    guest.write(driver + 0x800n, Buffer.from('\u001b[2J', 'utf16le'));
    expect(list()[1]!.name).toBe('?[2Jver.sys');
  });

  it('is refused when a loop misses the head', () => {
    const { guest, driver, last, list } = guestWithModules();
    guest.write64(last, driver);
    expect(list).toThrow(broken);
  });

  it('is refused when an entry leads out of kernel space, or to memory that is not there', () => {
    const { guest, driver, list } = guestWithModules();
    guest.write64(driver, 0x41414141n);
    expect(list).toThrow(broken);
    guest.write64(driver, 0xffff_ae77_0000_0000n);
    expect(list).toThrow(unmapped);
  });
});

describe('the processor of a vCPU', () => {
  const find = (guest: FakeGuest, vcpu = 0) =>
    findProcessor(discoverKernel(guest, profile), vcpu, guest.registers(vcpu));

  it('is found in kernel mode, with its stacks', () => {
    const guest = new FakeGuest({ vcpus: 2 });
    guest.setIst(1, 2, guest.processors[0]!.dpcStack);
    expect(find(guest, 1)).toEqual({
      vcpu: 1,
      kpcr: guest.processors[1]!.kpcr,
      currentThread: guest.processors[1]!.idle.gva,
      idleThread: guest.processors[1]!.idle.gva,
      rspBase: guest.initialStack(guest.processors[1]!.idle),
      rsp0: guest.initialStack(guest.processors[1]!.idle),
      dpcStack: guest.processors[1]!.dpcStack,
      isrStack: guest.processors[1]!.isrStack,
      ist: [guest.processors[0]!.dpcStack],
    });
  });

  it('is found in user mode, behind SWAPGS', () => {
    const guest = new FakeGuest();
    guest.enterUserMode(0);
    guest.write64(guest.symbol('KiProcessorBlock'), 0n);
    expect(find(guest)!.kpcr).toBe(guest.processors[0]!.kpcr);
  });

  it('is found in user mode by its task register, where the hypervisor does not tell the swapped GS', () => {
    const guest = new FakeGuest({ vcpus: 3 });
    guest.enterUserMode(1);
    guest.vcpus[1]!.shadowGs = 0n;
    expect(find(guest, 1)!.kpcr).toBe(guest.processors[1]!.kpcr);
  });

  it.each([
    ['leads to a structure of another kind', 0xffff_ae55_0000_0000n, 0x18n],
    ['leads into the middle of something', 0xffff_ae55_0000_0000n, 0x20n],
    ['is forged by a user program', 0x7fff_0000_0000n, undefined],
  ])('is found by its task register when GS %s', (_, gva, spoiled) => {
    const guest = new FakeGuest();
    guest.mapFresh(gva);
    guest.set(gva, '_KPCR', 'Self', gva);
    guest.set(gva, '_KPCR', 'CurrentPrcb', gva + 0x180n);
    if (spoiled !== undefined) guest.write64(gva + spoiled, 0n);
    guest.vcpus[0]!.gsBase = gva;
    expect(find(guest)!.kpcr).toBe(guest.processors[0]!.kpcr);
  });

  it('is not found on a vCPU that is still being brought up', () => {
    const guest = new FakeGuest({ vcpus: 2 });
    Object.assign(guest.vcpus[1]!, { gsBase: 0n, trBase: 0n });
    expect(find(guest, 1)).toBeUndefined();
  });

  it('is refused with a thread or a stack in user space', () => {
    for (const field of ['CurrentThread', 'IdleThread', 'DpcStack', 'IsrStack'] as const) {
      const guest = new FakeGuest();
      guest.set(guest.processors[0]!.kpcr + 0x180n, '_KPRCB', field, 0x4141_4140n);
      expect(() => find(guest)).toThrow(broken);
    }
  });
});
