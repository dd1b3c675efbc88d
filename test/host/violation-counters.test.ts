import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { SwitchSite } from '../../src/guest/artefacts.js';
import { accessForm } from '../../src/host/access-form.js';
import { ViolationCounters } from '../../src/host/violation-counters.js';
import { FakeMachine, load, type ScriptedInstruction } from './fake-machine.js';
import { Fixture } from './fixture.js';

const KERNEL = 0xfffff80000000000n;
const CODE_GPA = 0x8100;
const TRAPPED = 0x3000n;
const EXECUTE_ONLY = 4;
const SITE: SwitchSite = {
  name: 'site',
  form: 'one-level',
  function: 'F',
  functionRva: 0,
  section: '.text',
  loadRva: 0x100,
  tableRva: 0x3000,
  entries: 4,
  base: 'rdx',
  idx: 'rcx',
  dst: 'rax',
  guard: 'cmp',
  expected: 'relocatable',
};

/** Page tables at 0x1000 that map the kernel's first page to the code page. */
function mapCode(machine: FakeMachine): void {
  const entry = (table: number, index: number, value: number) =>
    machine.memory.writeBigUInt64LE(BigInt(value | 3), table + index * 8);
  entry(0x1000, 0x1f0, 0x4000);
  entry(0x4000, 0, 0x5000);
  entry(0x5000, 0, 0x6000);
  entry(0x6000, 0, 0x8000);
  machine.memory.set(load(0n).pieces[0]!.instruction, CODE_GPA);
}

let fixture: Fixture;
let counters: ViolationCounters;
let clock = 0;

beforeEach(async () => {
  const machine = new FakeMachine();
  mapCode(machine);
  clock = 0;
  counters = new ViolationCounters(machine, [{ base: KERNEL, sites: [SITE] }], () => clock);
  fixture = await Fixture.attached(counters, machine);
  await fixture.trap(TRAPPED, EXECUTE_ONLY);
});
afterEach(() => fixture.close());

async function violate(instruction: ScriptedInstruction, data?: Uint8Array): Promise<void> {
  fixture.machine.script(0, instruction);
  fixture.turn();
  fixture.tool.answer(await fixture.tool.event(), data ? { data } : {});
  await fixture.sync();
}

describe('violations', () => {
  it('are counted by site, with the time of the first and the last', async () => {
    clock = 10;
    await violate(load(TRAPPED));
    clock = 30;
    await violate(load(TRAPPED));
    const elsewhere = load(TRAPPED);
    await violate({ pieces: [{ ...elsewhere.pieces[0]!, rip: KERNEL + 0x200n }] });
    expect(counters.report()).toMatchObject({
      read: 3,
      otherReads: 1,
      stale: 0,
      sites: [{ site: 'site', load: 'dword', violations: 2, stale: 0, firstMs: 10, lastMs: 30 }],
    });
  });

  it('one whose site was replaced while it was open is stale; one that trapped later is not', async () => {
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    const event = await fixture.tool.event();
    await fixture.tool.write(BigInt(CODE_GPA), Buffer.from('e900000000', 'hex'));
    clock = 7;
    fixture.tool.answer(event);
    await fixture.sync();
    expect(counters.report()).toMatchObject({
      stale: 1,
      sites: [{ violations: 1, stale: 1, lastStaleMs: 7 }],
    });
    await violate(load(TRAPPED));
    expect(counters.report()).toMatchObject({ stale: 1, sites: [{ violations: 2, stale: 1 }] });
  });

  it('a write elsewhere makes none stale', async () => {
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    const event = await fixture.tool.event();
    await fixture.tool.write(0x9000n, Buffer.from('e900000000', 'hex'));
    fixture.tool.answer(event);
    await fixture.sync();
    expect(counters.report().stale).toBe(0);
  });

  it('one that is open when the tool hangs up is counted as stale too', async () => {
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    await fixture.tool.event();
    await fixture.tool.write(BigInt(CODE_GPA), Buffer.from([0xcc]));
    const again = fixture.tool.accept();
    fixture.tool.hangUp();
    await again;
    expect(counters.report().stale).toBe(1);
  });

  it('reads answered with bytes are counted by width or form, those completed on memory are not', async () => {
    const bytes = Buffer.alloc(64);
    const withInstruction = (code: string) => ({
      pieces: [{ ...load(TRAPPED).pieces[0]!, instruction: Buffer.from(code, 'hex') }],
    });
    await violate(load(TRAPPED), bytes);
    await violate(load(TRAPPED));
    await violate(withInstruction('f348a5'), bytes);
    await violate(withInstruction('0f1001'), bytes);
    expect(counters.report().substituted).toEqual({ 4: 1, 'rep movs': 1, 16: 1 });
  });
});

describe('the form of an access', () => {
  it.each([
    ['8a01', '1'],
    ['668b01', '2'],
    ['8b0411', '4'],
    ['488b01', '8'],
    ['0f1001', '16'],
    ['c5fe6f01', '32'],
    ['f20f1001', '8'], // movsd xmm0, [rcx] is no string instruction
    ['a4', 'movs'],
    ['f3a4', 'rep movs'],
    ['48ad', 'lods'],
    ['a6', 'cmps'],
    ['f3a6', 'rep cmps'],
    ['f2ae', 'rep scas'],
    ['06', 'unknown'],
    ['', 'unknown'],
  ])('%s is %s', (code, form) => {
    expect(accessForm(Buffer.from(code, 'hex'))).toBe(form);
  });
});
