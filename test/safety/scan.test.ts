import { describe, expect, it } from 'vitest';
import { MemtablesError } from '../../src/errors.js';
import { discoverKernel } from '../../src/nt/kernel.js';
import { parseProfile } from '../../src/nt/profile.js';
import { type LiveRange, scanGuest } from '../../src/safety/scan.js';
import { type Gva, PAGE_SIZE } from '../../src/vmi/address.js';
import { FakeGuest, type FakeThread, profile, profileText, State } from '../kernel/fake-guest.js';

/** Offsets in KTRAP_FRAME, and its size. */
const TRAP_RIP = 0x168n;
const TRAP_CS = 0x170n;
const TRAP_FRAME_SIZE = 0x190n;

function setUp(vcpus = 1) {
  const guest = new FakeGuest({ vcpus });
  const handler: LiveRange = { start: guest.base + 0x2f00n, end: guest.base + 0x2f80n, owner: 'handler' };
  const inside = handler.start + 0x11n;
  const scan = () => scanGuest(guest, discoverKernel(guest, profile), [handler]);
  const process = guest.addProcess('work.exe', 8n);
  return { guest, handler, inside, scan, process };
}

function writeTrapFrame(guest: FakeGuest, at: Gva, rip: Gva): void {
  guest.write64(at + TRAP_RIP, rip);
  guest.write64(at + TRAP_CS, 0x10n);
}

describe('a scan of a guest in which nothing lives in a range', () => {
  it('is safe, and has looked at every thread and at idle ones', () => {
    const { guest, scan, process } = setUp(2);
    guest.addThread(guest.system);
    guest.addThread(process, { state: State.Ready, depth: 0x1008n });
    expect(scan()).toMatchObject({ verdict: 'safe', findings: [], unsettled: [], scannedThreads: 4 });
    expect(scan().scannedBytes).toBe(0x400 + 0x1008 + 2 * 0x200);
  });
});

describe('a RIP in a range', () => {
  it('blocks, on any vCPU', () => {
    const { guest, inside, handler, scan } = setUp(3);
    guest.vcpus[2]!.rip = inside;
    expect(scan()).toMatchObject({
      verdict: 'blocked',
      findings: [{ kind: 'vcpu-rip', vcpu: 2, value: inside, range: handler }],
    });
  });

  it('does not block right behind the range, nor as a user-mode address', () => {
    const { guest, handler, scan } = setUp(2);
    guest.vcpus[0]!.rip = handler.end;
    guest.enterUserMode(1);
    guest.vcpus[1]!.rip = handler.start;
    expect(scan().verdict).toBe('safe');
  });

  it('blocks even on a vCPU whose stack is unknown', () => {
    const { guest, inside, scan } = setUp();
    guest.vcpus[0]!.rip = inside;
    guest.vcpus[0]!.rsp = 0x12_f000n;
    expect(scan().verdict).toBe('blocked');
  });
});

describe('a thread that does not run', () => {
  it.each([30, 31, 32, 38, 5, 0])(
    'blocks when it was preempted in a handler, wait reason %s',
    (waitReason) => {
      const { guest, inside, scan, process } = setUp();
      const thread = guest.addThread(process, { waitReason, depth: 0x600n });
      const frame = thread.base - 0x600n + 0x80n;
      writeTrapFrame(guest, frame, inside);
      expect(scan()).toMatchObject({
        verdict: 'blocked',
        findings: [
          {
            kind: 'thread-stack',
            where: frame + TRAP_RIP,
            value: inside,
            thread: { gva: thread.gva, process: { pid: 8n } },
          },
        ],
      });
    },
  );

  it.each([State.Ready, State.Standby])('blocks in state %s', (state) => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { state });
    guest.write64(thread.base - 0x100n, inside);
    expect(scan().verdict).toBe('blocked');
  });

  it('blocks for a frame deep under the wait of an APC, pages away from its stack pointer', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { depth: 0x5008n });
    writeTrapFrame(guest, thread.base - TRAP_FRAME_SIZE - 0x50n, inside);
    expect(scan().findings).toHaveLength(1);
  });

  it('blocks for the value at its stack pointer and for the last one of its stack', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { depth: 0x400n });
    guest.write64(thread.base - 0x400n, inside);
    guest.write64(thread.base - 8n, inside);
    expect(scan().findings.map(({ where }) => where)).toEqual([thread.base - 0x400n, thread.base - 8n]);
  });

  it('does not block for a value right below its stack pointer', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { depth: 0x400n });
    guest.write64(thread.base - 0x408n, inside);
    expect(scan().verdict).toBe('safe');
  });

  it('does not block for a value that is not aligned', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { depth: 0x400n });
    guest.write64(thread.base - 0x104n, inside);
    expect(scan().verdict).toBe('safe');
  });

  it('blocks with a large stack', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { stackBytes: 0x12000, depth: 0x11000n });
    guest.write64(thread.base - 0x11000n, inside);
    expect(scan().verdict).toBe('blocked');
  });

  it('is skipped when it is terminated, whatever its stack has become', () => {
    const { guest, scan, process } = setUp();
    const thread = guest.addThread(process, { state: State.Terminated });
    for (const field of ['StackBase', 'StackLimit', 'KernelStack'])
      guest.set(thread.gva, '_KTHREAD', field, 0n);
    expect(scan()).toMatchObject({ verdict: 'safe', scannedThreads: 1 });
  });

  it('is unsettled when its stack is paged out', () => {
    const { guest, scan, process } = setUp();
    const thread = guest.addThread(process, { depth: 0x3000n });
    guest.unmap(thread.base - 0x2000n);
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringMatching(/work\.exe \(8\) is not in memory/)],
    });
  });

  it('blocks all the same for what is left of a stack that is partly paged out', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { depth: 0x3000n });
    guest.write64(thread.base - 0x3000n, inside);
    guest.unmap(thread.base - 0x2000n);
    expect(scan()).toMatchObject({ verdict: 'blocked', unsettled: [expect.anything()] });
  });

  it('is unsettled when it claims to run', () => {
    const { guest, scan, process } = setUp();
    guest.addThread(process, { state: State.Running });
    expect(scan().verdict).toBe('unsettled');
  });

  it('is unsettled when it saved a stack pointer outside its stack, and hides no other thread', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process);
    guest.set(thread.gva, '_KTHREAD', 'KernelStack', thread.base + 0x1000n);
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringContaining('saved a stack pointer outside its stack')],
    });
    guest.write64(guest.addThread(process).base - 0x100n, inside);
    expect(scan()).toMatchObject({ verdict: 'blocked', unsettled: [expect.anything()] });
  });
});

describe('a thread that waits in user mode', () => {
  const WAITS_IN_USER_MODE = 1n;
  const Transition = 6n;
  const swappable = ({ guest, process }: ReturnType<typeof setUp>) => {
    const thread = guest.addThread(process, { depth: 0x3000n });
    guest.set(thread.gva, '_KTHREAD', 'WaitMode', WAITS_IN_USER_MODE);
    return thread;
  };
  const swapOut = (guest: FakeGuest, { limit, base }: FakeThread) => {
    for (let page = limit; page < base; page += BigInt(PAGE_SIZE)) guest.unmap(page);
  };
  const stackIsMissing = [expect.stringMatching(/work\.exe \(8\)(:| is not in memory)/)];

  it('is safe though its whole stack is paged out', () => {
    const all = setUp();
    swapOut(all.guest, swappable(all));
    expect(all.scan()).toMatchObject({ verdict: 'safe', unsettled: [] });
  });

  it('is safe though its stack was expanded and an earlier one is paged out', () => {
    const all = setUp();
    const first = swappable(all);
    all.guest.expandStack(first, 0x1000n);
    swapOut(all.guest, first);
    expect(all.scan()).toMatchObject({ verdict: 'safe', unsettled: [] });
  });

  it('blocks for what is in memory of its stack, on both sides of a page that is not', () => {
    const all = setUp();
    const { base } = swappable(all);
    all.guest.write64(base - 0x3000n, all.inside);
    all.guest.write64(base - 0x800n, all.inside);
    all.guest.unmap(base - 0x2000n);
    expect(all.scan()).toMatchObject({
      verdict: 'blocked',
      findings: [{ where: base - 0x3000n }, { where: base - 0x800n }],
      unsettled: [],
    });
  });

  it.each([
    ['it waits in kernel mode', 'WaitMode', 0n],
    ['it is ready', 'State', BigInt(State.Ready)],
    ['its wait is over and its stack on the way back', 'State', Transition],
  ] as const)('is unsettled with a stack that is paged out when %s', (_, field, value) => {
    const all = setUp();
    const thread = swappable(all);
    all.guest.set(thread.gva, '_KTHREAD', field, value);
    swapOut(all.guest, thread);
    expect(all.scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: expect.arrayContaining(stackIsMissing),
    });
  });

  it('is unsettled with a stack that is paged out when a vCPU still runs it', () => {
    const all = setUp();
    const thread = swappable(all);
    all.guest.run(0, thread, 0x3000n);
    all.guest.set(thread.gva, '_KTHREAD', 'State', BigInt(State.Waiting));
    all.guest.unmap(thread.base - 0x2000n);
    expect(all.scan()).toMatchObject({ verdict: 'unsettled', unsettled: stackIsMissing });
  });

  it('is unsettled when the earlier stacks of a thread that waits in kernel mode cannot be found', () => {
    const all = setUp();
    const thread = swappable(all);
    all.guest.set(thread.gva, '_KTHREAD', 'WaitMode', 0n);
    all.guest.set(thread.gva, '_KTHREAD', 'InitialStack', 0xffff_ae77_0000_0000n);
    expect(all.scan()).toMatchObject({ verdict: 'unsettled', unsettled: stackIsMissing });
  });

  it('is unsettled with a stack that is paged out when the profile does not say how it waits', () => {
    const all = setUp();
    const text = profileText((isf) => {
      delete isf.user_types._KTHREAD!.fields.WaitMode;
    });
    swapOut(all.guest, swappable(all));
    const kernel = discoverKernel(all.guest, parseProfile(text, 'test'));
    expect(scanGuest(all.guest, kernel, [all.handler])).toMatchObject({
      verdict: 'unsettled',
      unsettled: expect.arrayContaining(stackIsMissing),
    });
  });
});

describe('an idle thread', () => {
  it('blocks when another thread has taken its processor', () => {
    const { guest, inside, scan, process } = setUp();
    guest.run(0, guest.addThread(process));
    guest.write64(guest.processors[0]!.idle.base - 0x200n, inside);
    expect(scan()).toMatchObject({
      verdict: 'blocked',
      findings: [{ kind: 'thread-stack', thread: { gva: guest.processors[0]!.idle.gva } }],
    });
  });

  it('blocks when it runs', () => {
    const { guest, inside, scan } = setUp(2);
    guest.write64(guest.processors[1]!.idle.base - 0x180n, inside);
    expect(scan().findings).toMatchObject([{ kind: 'thread-stack', vcpu: 1 }]);
  });
});

describe('a thread that runs', () => {
  it('is scanned from the RSP of its vCPU, not from the stack pointer it once saved', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { depth: 0x100n });
    guest.run(0, thread, 0x800n);
    guest.write64(thread.base - 0x700n, inside);
    expect(scan().findings).toMatchObject([{ kind: 'thread-stack', vcpu: 0, where: thread.base - 0x700n }]);
    guest.vcpus[0]!.rsp = thread.base - 0x600n;
    expect(scan().verdict).toBe('safe');
  });

  it('is not asked for a saved stack pointer', () => {
    const { guest, scan, process } = setUp();
    const thread = guest.addThread(process);
    guest.run(0, thread);
    guest.set(thread.gva, '_KTHREAD', 'KernelStack', 0n);
    expect(scan().verdict).toBe('safe');
  });

  it('blocks though it is terminated: it has not left its stack yet', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process);
    guest.run(0, thread);
    guest.set(thread.gva, '_KTHREAD', 'State', BigInt(State.Terminated));
    guest.write64(thread.base - 0x100n, inside);
    expect(scan().verdict).toBe('blocked');
  });

  it('blocks though it is in no list', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process);
    guest.run(0, thread);
    const head = process + guest.offset('_EPROCESS', 'ThreadListHead');
    guest.write64(head, head);
    guest.write64(head + 8n, head);
    guest.write64(thread.base - 0x100n, inside);
    expect(scan().verdict).toBe('blocked');
  });

  it('counts from the aligned value that RSP points into', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process);
    guest.run(0, thread);
    guest.vcpus[0]!.rsp = thread.base - 0x1fcn;
    guest.write64(thread.base - 0x200n, inside);
    expect(scan().verdict).toBe('blocked');
  });
});

describe('a thread whose stack was expanded', () => {
  it.each([false, true])(
    'blocks for a value on an earlier stack, but not below where that was left; runs: %s',
    (runs) => {
      const { guest, inside, scan, process } = setUp();
      const first = guest.addThread(process);
      const second = guest.expandStack(first, 0x1000n);
      const third = guest.expandStack(second, 0x800n);
      if (runs) guest.run(0, third);
      guest.write64(first.base - 0x1008n, inside);
      guest.write64(second.base - 0x808n, inside);
      expect(scan()).toMatchObject({ verdict: 'safe', unsettled: [] });
      guest.write64(first.base - 0x1000n, inside);
      guest.write64(second.base - 0x800n, inside);
      expect(scan().findings.map(({ where }) => where)).toEqual([second.base - 0x800n, first.base - 0x1000n]);
    },
  );

  it('reports a value above a call back into user mode once: it lies on the same stack', () => {
    const { guest, inside, scan, process } = setUp();
    const thread = guest.addThread(process, { depth: 0x1800n });
    const control = thread.base - 0x1000n;
    const previous = control + guest.offset('_KSTACK_CONTROL', 'Previous');
    guest.set(previous, '_KERNEL_STACK_SEGMENT', 'StackBase', thread.base);
    guest.set(previous, '_KERNEL_STACK_SEGMENT', 'InitialStack', guest.initialStack(thread));
    guest.set(thread.gva, '_KTHREAD', 'InitialStack', control);
    guest.write64(thread.base - 0x800n, inside);
    expect(scan()).toMatchObject({ findings: [{ where: thread.base - 0x800n }], unsettled: [] });
  });

  it('is unsettled when its stacks lead in a circle', () => {
    const { guest, scan, process } = setUp();
    const first = guest.addThread(process);
    const second = guest.expandStack(first, 0x1000n);
    const previous = guest.initialStack(second) + guest.offset('_KSTACK_CONTROL', 'Previous');
    guest.set(previous, '_KERNEL_STACK_SEGMENT', 'InitialStack', guest.initialStack(second));
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringContaining('more than 256 stacks')],
    });
  });

  it('is unsettled when an earlier stack cannot be one', () => {
    const { guest, scan, process } = setUp();
    const second = guest.expandStack(guest.addThread(process), 0x1000n);
    const previous = guest.initialStack(second) + guest.offset('_KSTACK_CONTROL', 'Previous');
    guest.set(previous, '_KERNEL_STACK_SEGMENT', 'StackLimit', 0x1000n);
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringContaining('no possible stack')],
    });
  });
});

describe('a vCPU in user mode', () => {
  const inUserMode = () => {
    const all = setUp();
    const thread = all.guest.addThread(all.process);
    all.guest.run(0, thread);
    all.guest.enterUserMode(0);
    return { ...all, thread };
  };

  it('has nothing alive where the kernel would begin to push', () => {
    const { guest, inside, scan, thread } = inUserMode();
    guest.write64(guest.initialStack(thread) - 8n, inside);
    expect(scan().verdict).toBe('safe');
  });

  it('has the frames above a call back into user mode alive', () => {
    const { guest, inside, scan, thread } = inUserMode();
    const entry = thread.base - 0x800n;
    guest.set(guest.processors[0]!.kpcr + 0x180n, '_KPRCB', 'RspBase', entry);
    guest.write64(guest.processors[0]!.tss + 4n, entry);
    guest.set(thread.gva, '_KTHREAD', 'InitialStack', entry);
    guest.write64(thread.base - 0x700n, inside);
    expect(scan().findings).toMatchObject([{ kind: 'thread-stack', vcpu: 0 }]);
  });

  it('is scanned under KVA shadow, where interrupts enter on a stack of their own', () => {
    const { guest, inside, scan, thread } = inUserMode();
    guest.write64(guest.processors[0]!.tss + 4n, guest.allocate(0x1000) + 0x1000n);
    guest.write64(guest.initialStack(thread) - 8n, inside);
    expect(scan().verdict).toBe('safe');
    guest.write64(thread.base - 0x10n, inside);
    expect(scan().verdict).toBe('blocked');
  });

  it('has its whole stack looked at when nothing says where the kernel enters', () => {
    const { guest, inside, scan, thread } = inUserMode();
    guest.set(guest.processors[0]!.kpcr + 0x180n, '_KPRCB', 'RspBase', 0n);
    guest.write64(guest.processors[0]!.tss + 4n, 0n);
    guest.set(thread.gva, '_KTHREAD', 'InitialStack', guest.allocate(0x1000));
    guest.write64(thread.limit, inside);
    expect(scan().verdict).toBe('blocked');
  });
});

describe('a vCPU on a stack of its processor', () => {
  const interrupted = (choose: (guest: FakeGuest) => Gva) => {
    const all = setUp();
    const thread = all.guest.addThread(all.process);
    all.guest.run(0, thread);
    const ist = all.guest.allocate(0x4000) + 0x4000n;
    all.guest.setIst(0, 2, ist);
    const top = choose(all.guest) || ist;
    all.guest.vcpus[0]!.rsp = top - 0x300n;
    return { ...all, thread, top };
  };
  const stacks: [string, (guest: FakeGuest) => Gva][] = [
    ['dpc-stack', (guest) => guest.processors[0]!.dpcStack],
    ['isr-stack', (guest) => guest.processors[0]!.isrStack],
    ['ist-stack', () => 0n],
  ];

  it.each(stacks)('is safe when nothing lives there: %s', (_, choose) => {
    expect(interrupted(choose).scan()).toMatchObject({ verdict: 'safe', unsettled: [] });
  });

  it.each(stacks)('blocks for a value on it: %s', (kind, choose) => {
    const { guest, inside, scan, top } = interrupted(choose);
    guest.write64(top - 0x300n, inside);
    expect(scan().findings).toMatchObject([{ kind, vcpu: 0, where: top - 0x300n }]);
  });

  it.each(stacks)('does not block for a value below its RSP: %s', (_, choose) => {
    const { guest, inside, scan, top } = interrupted(choose);
    guest.write64(top - 0x308n, inside);
    expect(scan().verdict).toBe('safe');
  });

  it.each(stacks)('blocks for the trap frame of the thread it interrupted: %s', (_, choose) => {
    const { guest, inside, scan, thread } = interrupted(choose);
    writeTrapFrame(guest, thread.base - 0x1800n, inside);
    expect(scan().findings).toMatchObject([
      { kind: 'thread-stack', where: thread.base - 0x1800n + TRAP_RIP },
    ]);
  });

  it('blocks for what a non-maskable interrupt interrupted on the DPC stack', () => {
    const { guest, inside, scan } = interrupted(() => 0n);
    guest.write64(guest.processors[0]!.dpcStack - 0x1000n, inside);
    expect(scan().findings).toMatchObject([{ kind: 'dpc-stack', vcpu: 0 }]);
  });

  it('is not taken for one that switches, when a terminated thread once had its stack there', () => {
    const { guest, scan, process, top } = interrupted((each) => each.processors[0]!.dpcStack);
    const thread = guest.addThread(process, { state: State.Terminated });
    guest.set(thread.gva, '_KTHREAD', 'StackBase', top);
    guest.set(thread.gva, '_KTHREAD', 'StackLimit', top - 0x6000n);
    expect(scan().verdict).toBe('safe');
  });

  it('leaves the dead values on it alone once its thread is back on its own', () => {
    const { guest, inside, scan, thread, top } = interrupted((each) => each.processors[0]!.dpcStack);
    guest.write64(top - 0x300n, inside);
    guest.vcpus[0]!.rsp = thread.base - 0x200n;
    expect(scan().verdict).toBe('safe');
  });
});

describe('a vCPU that cannot be judged', () => {
  it('is unsettled in the middle of a context switch, on the stack of the thread it leaves', () => {
    const { guest, scan, process } = setUp();
    const from = guest.addThread(process);
    guest.run(0, guest.addThread(process));
    guest.vcpus[0]!.rsp = from.base - 0x300n;
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringContaining('between thread')],
    });
  });

  it('is unsettled at the first instructions of a system call, still on the user stack', () => {
    const { guest, scan } = setUp();
    guest.vcpus[0]!.rsp = 0x12_f000n;
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringContaining('unknown stack')],
    });
  });

  it('is unsettled on a stack that nothing records, as those of KVA shadow entries', () => {
    const { guest, scan } = setUp();
    guest.vcpus[0]!.rsp = guest.allocate(0x2000) + 0x1800n;
    expect(scan().verdict).toBe('unsettled');
  });

  it('is unsettled in memory that only looks like a stack from afar: a page in between is not mapped', () => {
    const { guest, scan } = setUp();
    const top = guest.processors[0]!.dpcStack;
    guest.unmap(top - 0x2000n);
    guest.vcpus[0]!.rsp = top - 0x2800n;
    expect(scan().verdict).toBe('unsettled');
  });

  it('is unsettled while it is being brought up', () => {
    const { guest, scan } = setUp(2);
    Object.assign(guest.vcpus[1]!, { gsBase: 0n, trBase: 0n });
    expect(scan().verdict).toBe('unsettled');
  });

  it('is left out while it has not been started', () => {
    const { guest, scan } = setUp(2);
    Object.assign(guest.vcpus[1]!, { efer: 0n, cr3: 0n, gsBase: 0n, trBase: 0n });
    expect(scan()).toMatchObject({ verdict: 'safe', scannedThreads: 1 });
  });
});

describe('a vCPU that was paused in the middle of a change', () => {
  const settled = { verdict: 'safe', unsettled: [] };

  it('leaves the scan unsettled when a process was half unlinked, until the list is whole again', () => {
    const { guest, scan, process } = setUp();
    const [links, head] = [
      guest.offset('_EPROCESS', 'ActiveProcessLinks'),
      guest.symbol('PsActiveProcessHead'),
    ];
    const previous = guest.system + links;
    guest.write64(previous, head);
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringContaining('the list of processes is broken')],
    });
    guest.write64(previous, process + links);
    expect(scan()).toMatchObject(settled);
    guest.write64(previous, head);
    guest.write64(head + 8n, previous);
    expect(scan()).toMatchObject(settled);
  });

  it('leaves the scan unsettled when a thread is half in its list, until it is in', () => {
    const { guest, scan, process } = setUp();
    const links = guest.offset('_ETHREAD', 'ThreadListEntry');
    const entry = guest.addThread(process).gva + links;
    const next = guest.read64(entry);
    guest.write64(entry, 0n);
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringContaining('a link of the list of threads of process 8')],
    });
    guest.write64(entry, next);
    expect(scan()).toMatchObject(settled);
  });

  it('leaves the scan unsettled when a link leads to memory that is not there, and says of which list', () => {
    const { guest, scan, process } = setUp();
    const thread = guest.addThread(process);
    guest.write64(thread.gva + guest.offset('_ETHREAD', 'ThreadListEntry'), 0xffff_ae77_0000_0000n);
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: ['the threads of process work.exe (8): no memory is mapped at 0xffffae7700000000'],
    });
  });

  it.each(['CurrentThread', 'IdleThread', 'DpcStack'])(
    'leaves the scan unsettled when %s of its processor is none',
    (field) => {
      const { guest, scan } = setUp(2);
      guest.set(guest.processors[1]!.kpcr + 0x180n, '_KPRCB', field, 0x1000n);
      expect(scan()).toMatchObject({
        verdict: 'unsettled',
        unsettled: [expect.stringContaining('of vCPU 1')],
      });
    },
  );

  it('leaves the scan unsettled when its current thread has no stack yet', () => {
    const { guest, scan, process } = setUp();
    const thread = guest.addThread(process);
    guest.run(0, thread);
    guest.set(thread.gva, '_KTHREAD', 'StackBase', 0n);
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: [expect.stringContaining('no possible stack')],
    });
  });

  it('hides nothing that can still be found: other lists, other processors, RIPs', () => {
    const { guest, inside, scan, process } = setUp(2);
    const listed = guest.addThread(process);
    guest.write64(listed.base - 0x100n, inside);
    const broken = guest.addThread(guest.system).gva;
    guest.write64(broken + guest.offset('_ETHREAD', 'ThreadListEntry'), 0n);
    const last = guest.addProcess('last.exe', 12n) + guest.offset('_EPROCESS', 'ActiveProcessLinks');
    guest.write64(last, last);
    guest.set(guest.processors[0]!.kpcr + 0x180n, '_KPRCB', 'CurrentThread', 0n);
    guest.vcpus[0]!.rip = inside;
    guest.write64(guest.processors[1]!.idle.base - 0x180n, inside);
    const { verdict, findings, unsettled } = scan();
    expect(verdict).toBe('blocked');
    expect(findings).toMatchObject([
      { kind: 'vcpu-rip', vcpu: 0 },
      { kind: 'thread-stack', vcpu: 1 },
      { kind: 'thread-stack', thread: { gva: listed.gva } },
    ]);
    expect(unsettled).toHaveLength(3);
  });
});

describe('a hypervisor that fails', () => {
  it.each(['registers', 'readPhysical', 'translate'] as const)(
    'ends the scan, instead of leaving it unsettled: %s',
    (call) => {
      const { guest, handler } = setUp();
      const kernel = discoverKernel(guest, profile);
      guest[call] = () => {
        throw new MemtablesError('HYPERVISOR_FAILED', 'it fails', { remedy: 'None.' });
      };
      expect(() => scanGuest(guest, kernel, [handler])).toThrow(
        expect.objectContaining({ code: 'HYPERVISOR_FAILED' }),
      );
    },
  );
});

describe('a guest that wants to keep the scan busy', () => {
  const shareStack = (guest: FakeGuest, thread: FakeThread, { limit, base }: FakeThread, control: Gva) => {
    guest.set(thread.gva, '_KTHREAD', 'StackLimit', limit);
    guest.set(thread.gva, '_KTHREAD', 'StackBase', base);
    guest.set(thread.gva, '_KTHREAD', 'KernelStack', limit);
    guest.set(thread.gva, '_KTHREAD', 'InitialStack', control);
  };

  it('is unsettled when its threads share a stack of 128 KB, and its RIPs are looked at all the same', () => {
    const { guest, inside, scan, process } = setUp();
    const shared = guest.addThread(process, { stackBytes: 0x2_0000 });
    for (let count = 0; count < 2100; count++) {
      const thread = guest.addThread(process, { stackBytes: PAGE_SIZE });
      shareStack(guest, thread, shared, guest.initialStack(shared));
    }
    const { verdict, unsettled, scannedBytes } = scan();
    expect({ verdict, unsettled }).toEqual({
      verdict: 'unsettled',
      unsettled: ['the guest has more than 268435456 bytes of stacks'],
    });
    expect(scannedBytes).toBeLessThanOrEqual(0x1000_0000 + 0x2_0000);
    guest.vcpus[0]!.rip = inside;
    expect(scan().verdict).toBe('blocked');
  });

  it('is unsettled when its threads share a chain of earlier stacks', () => {
    const { guest, scan, process } = setUp();
    const shared = guest.addThread(process);
    const chain = guest.allocate(0x3000);
    const control = (index: number) => chain + BigInt(index * 0x30);
    for (let index = 0; index < 250; index++) {
      const previous = control(index) + guest.offset('_KSTACK_CONTROL', 'Previous');
      guest.set(previous, '_KERNEL_STACK_SEGMENT', 'StackBase', shared.base);
      guest.set(previous, '_KERNEL_STACK_SEGMENT', 'InitialStack', control(index + 1));
    }
    for (let count = 0; count < 300; count++) {
      const thread = guest.addThread(process, { stackBytes: PAGE_SIZE });
      shareStack(guest, thread, { ...shared, limit: shared.base - 0x100n }, control(0));
    }
    expect(scan()).toMatchObject({
      verdict: 'unsettled',
      unsettled: ['the guest has more than 65536 earlier stacks'],
    });
  });

  it('is unsettled when all its processes together have more than 65,536 threads', () => {
    const { guest, scan } = setUp();
    // Only the fields that are read; three of them to a page.
    const [stride, perPage, perProcess] = [0x540n, 3, 21_846];
    const links = guest.offset('_ETHREAD', 'ThreadListEntry');
    for (const pid of [12n, 16n, 20n]) {
      const process = guest.addProcess('many.exe', pid);
      const head = process + guest.offset('_EPROCESS', 'ThreadListHead');
      const memory = guest.allocate((perProcess / perPage) * PAGE_SIZE);
      const thread = (index: number) =>
        memory + BigInt(Math.floor(index / perPage) * PAGE_SIZE) + BigInt(index % perPage) * stride;
      const entry = (index: number) => (index < 0 || index === perProcess ? head : thread(index) + links);
      for (let first = 0; first < perProcess; first += perPage) {
        const page = Buffer.alloc(PAGE_SIZE);
        for (let index = first; index < first + perPage; index++) {
          const at = Number(thread(index) - thread(first));
          page.writeBigUInt64LE(process, at + Number(guest.offset('_KTHREAD', 'Process')));
          page.writeUInt8(State.Terminated, at + Number(guest.offset('_KTHREAD', 'State')));
          page.writeBigUInt64LE(entry(index + 1), at + Number(links));
          page.writeBigUInt64LE(entry(index - 1), at + Number(links) + 8);
        }
        guest.write(thread(first), page);
      }
      guest.write64(head, entry(0));
      guest.write64(head + 8n, entry(perProcess - 1));
      expect(scan()).toMatchObject(
        pid === 20n
          ? { verdict: 'unsettled', unsettled: ['the guest has more than 65536 threads'] }
          : { verdict: 'safe' },
      );
    }
  });

  it('is told why it is unsettled a thousand times, no more', () => {
    const { guest, scan, process } = setUp();
    for (let count = 0; count < 1001; count++) guest.addThread(process, { state: State.Running });
    const { verdict, unsettled } = scan();
    expect(verdict).toBe('unsettled');
    expect(unsettled).toHaveLength(1000);
  });
});

describe('many findings', () => {
  it('are cut off, but still block, and it is said that they are not all', () => {
    const { guest, inside, scan, process } = setUp();
    for (let count = 0; count < 2; count++) {
      const thread = guest.addThread(process, { depth: 0x6000n });
      const top = guest.initialStack(thread);
      for (let at = thread.limit; at < top; at += 8n) guest.write64(at, inside);
    }
    expect(scan().verdict).toBe('blocked');
    expect(scan().findings).toHaveLength(1000);
    expect(scan().unsettled).toEqual(['there are more than 1000 live pointers']);
  });
});
