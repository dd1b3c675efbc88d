import { describe, expect, it } from 'vitest';
import { ACCESS_EXECUTE, type Trap } from '../../src/machine/machine.js';
import { PeImage, type Section } from '../../src/nt/pe.js';
import { type Gva, gfnOf, hex, PAGE_SIZE, pageOffset } from '../../src/vmi/address.js';
import { decodeInstruction, type Instruction, Mnemonic } from '../../src/x86/instruction.js';
import { onlyReadOf } from '../../src/x86/only-read.js';
import { SteppedGuest } from './stepped-guest.js';

// The report's fields, by native/guest/guest.inc.
const REPORT_MISMATCHES = 0x10n;
const REPORT_FIRST_MISMATCH = 0x18n;

const pageEnd = (rva: number) => Math.ceil(rva / PAGE_SIZE) * PAGE_SIZE;

/** What the checker looks at: headers and non-writable sections, with the slack behind them. */
function checked(guest: SteppedGuest): { name: string; rva: number; size: number; virtualSize: number }[] {
  const image = PeImage.fromFile(guest.artefacts.image);
  const fixed = image.sections.filter((section: Section) => !section.writable);
  return [{ name: 'headers', rva: 0, virtualSize: image.sizeOfHeaders }, ...fixed].map(
    ({ name, rva, virtualSize }) => ({ name, rva, virtualSize, size: pageEnd(virtualSize) }),
  );
}

/** Places in all of these, where a changed byte does not change what the guest does. */
function harmlessPlaces(guest: SteppedGuest): [what: string, rva: number][] {
  const symbol = (name: string) => guest.profile.symbol(name);
  const unreachable = guest.artefacts.sites.sites.find(({ name }) => name === 'MmProbeAndLockPages')!;
  const places: [string, number][] = [
    ['the DOS header', 0x20],
    ['the last byte of the page of the headers', PAGE_SIZE - 1],
    ['code in .text', symbol('KiUnexpectedInterrupt') + 7],
    ['padding between functions', symbol('RtlGetVersion') - 1],
    ['a switch table', unreachable.tableRva + 4],
    ['the top byte of a table entry', unreachable.tableRva + 15],
    ['code in PAGE', symbol('MmPagedStub')],
  ];
  for (const { name, rva, virtualSize, size } of checked(guest)) {
    if (name === 'headers') continue;
    places.push([`the first byte of the slack of ${name}`, rva + virtualSize]);
    places.push([`the last byte of the slack of ${name}`, rva + size - 1]);
  }
  for (const name of ['TRACESUP', '.pdata', '.edata', '.reloc']) {
    const { rva, virtualSize } = checked(guest).find((each) => each.name === name)!;
    places.push([`the first byte of ${name}`, rva], [`the last byte of ${name}`, rva + virtualSize - 1]);
  }
  const rdata = checked(guest).find(({ name }) => name === '.rdata')!;
  places.push(['a name in .rdata', symbol('WlCodeView') + 24], ['.rdata in its first page', rdata.rva + 1]);
  return places;
}

describe('the integrity checker', () => {
  it('sees one changed byte in any kind of place, and where, and nothing else', () => {
    const guest = SteppedGuest.boot({ vcpus: 1, seed: 61 });
    const report = guest.symbol('WlReport');
    const forget = () => {
      guest.write(report + REPORT_MISMATCHES, Buffer.alloc(8));
      guest.write(report + REPORT_FIRST_MISMATCH, Buffer.alloc(8));
    };
    guest.sweep();
    expect(guest.report().integrity.mismatches).toBe(0n);

    const changes = new Map<Gva, { what: string; expected: number; found: number }>();
    for (const [what, rva] of harmlessPlaces(guest)) {
      const gva = guest.loaded.kernelBase + BigInt(rva);
      const [expected] = guest.read(gva, 1);
      changes.set(gva, { what, expected: expected!, found: expected! ^ (1 << (rva % 8)) });
      guest.write(gva, Uint8Array.of(expected! ^ (1 << (rva % 8))));
    }
    // The report keeps the first one only: put right what it names, and let it find the next.
    const unseen = new Set(changes.keys());
    while (unseen.size > 0) {
      const left = [...unseen].map((gva) => changes.get(gva)!.what).join(', ');
      guest.until(({ integrity }) => integrity.firstMismatch !== undefined, `see a change of ${left}`);
      const { gva, expected, found } = guest.report().integrity.firstMismatch!;
      expect({ expected, found }, hex(gva)).toEqual({
        expected: changes.get(gva)?.expected,
        found: changes.get(gva)?.found,
      });
      guest.write(gva, Uint8Array.of(expected));
      unseen.delete(gva);
      forget();
    }
    // What had been read before the last was put right is compared once more.
    guest.sweep();
    forget();
    guest.sweep(2);
    expect(guest.report().integrity.mismatches).toBe(0n);
    expect(guest.report().integrity.firstMismatch).toBeUndefined();
    expect(guest.report().bugCheck).toBeUndefined();
  });

  /** The reads of some pages of the image, as traps, in this many whole sweeps: the checker's, and those of others. */
  function reads(
    sweeps: number,
    isTrapped: (page: number) => boolean,
    simpleReads = false,
  ): { guest: SteppedGuest; traps: Trap[]; others: Trap[] } {
    const guest = SteppedGuest.boot({ vcpus: 1, seed: 63, simpleReads });
    const [first, last] = [guest.symbol('WlIntegrityThread'), guest.symbol('WlReadLikeAnUnwinder')];
    const traps: Trap[] = [];
    const others: Trap[] = [];
    guest.onTrap = (trap) => {
      if (trap.access === 'read') (trap.rip >= first && trap.rip < last ? traps : others).push(trap);
    };
    for (const { rva, size } of checked(guest)) {
      for (let page = rva; page < rva + size; page += PAGE_SIZE) {
        const gpa = guest.loaded.translate(guest.loaded.kernelBase + BigInt(page))!;
        if (isTrapped(page / PAGE_SIZE)) guest.machine.setAccess(gfnOf(gpa), ACCESS_EXECUTE);
      }
    }
    // The first one has begun already.
    guest.sweep(sweeps + 1);
    expect(guest.report().integrity.mismatches).toBe(0n);
    return { guest, traps, others };
  }

  function expectAllSeen(guest: SteppedGuest, traps: readonly Trap[]): void {
    const seen = new Uint8Array(guest.loaded.imageSize);
    for (const { gva, length } of traps) {
      const rva = Number(gva - guest.loaded.kernelBase);
      seen.fill(1, rva, rva + length);
    }
    for (const { name, rva, size } of checked(guest)) {
      expect(seen.subarray(rva, rva + size).indexOf(0), name).toBe(-1);
    }
  }

  it('reads every byte in every sweep, in every way that a checker may, also across page edges', () => {
    const { guest, traps } = reads(1, () => true);
    expectAllSeen(guest, traps);
    const forms = new Set<string>();
    const split = new Map<string, Set<number>>();
    for (const trap of traps) {
      const instruction = decode(trap);
      const form = formOf(instruction);
      forms.add(form);
      if (trap.length < widthOf(instruction))
        split.set(form, (split.get(form) ?? new Set()).add(trap.length));
    }
    for (const form of [
      ...['mov 1', 'mov 2', 'mov 4', 'mov 8', 'movzx 1', 'movzx 2', 'movsx 1', 'movsx 2', 'movsxd 4'],
      ...[
        'movups 16',
        'lodsb 1',
        'lodsw 2',
        'lodsd 4',
        'lodsq 8',
        'movsb 1',
        'movsd 4',
        'movsq 8',
        'cmpsb 1',
      ],
    ]) {
      expect(forms.has(form), form).toBe(true);
    }
    // The bytes on the one page and on the other.
    expect(
      Object.fromEntries([...split].map(([form, pieces]) => [form, [...pieces].sort((a, b) => a - b)])),
    ).toEqual({
      'movzx 2': [1],
      'mov 4': [2],
      'mov 8': [3, 5],
      'movups 16': [5, 11],
    });
  });

  it('reads every byte once an instruction and page by page, where reads have to be simple', () => {
    const { guest, traps, others } = reads(1, () => true, true);
    expectAllSeen(guest, traps);
    const complex = [...traps, ...others].filter(
      ({ instruction, length }) => onlyReadOf(instruction) !== length,
    );
    expect(new Set(complex.map((trap) => formOf(decode(trap))))).toEqual(new Set());
  });

  it('reads another part of a page narrowly in each sweep', () => {
    const { traps } = reads(3, (page) => page === 3);
    const narrow = new Set<number>();
    for (const trap of traps) {
      if (formOf(decode(trap)) === 'lodsb 1') narrow.add(pageOffset(trap.gva) >> 8);
    }
    expect(narrow.size).toBeGreaterThanOrEqual(3);
  });
});

const decoded = new Map<string, Instruction>();

function decode({ instruction }: Trap): Instruction {
  const key = instruction.toString('latin1');
  const known = decoded.get(key) ?? decodeInstruction(instruction, 0n)!;
  decoded.set(key, known);
  return known;
}

/** Of the memory it reads, for one repetition. */
function widthOf({ operands }: Instruction): number {
  const memory = operands.find((operand) => operand.kind === 'memory' && operand.reads);
  return memory?.kind === 'memory' ? memory.size : 0;
}

function formOf(instruction: Instruction): string {
  return `${Mnemonic[instruction.mnemonic]!.toLowerCase()} ${widthOf(instruction)}`;
}
