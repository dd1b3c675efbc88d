import { describe, expect, it } from 'vitest';
import { readGuestModule } from '../../src/guest/lexer-module.js';
import { lexerText } from '../../src/guest/lexer-text.js';
import { LEXER_PIECE_BYTES } from '../../src/guest/loader.js';
import { type GuestReport, readGuestReport } from '../../src/guest/report.js';
import { surveyFunction } from '../../src/hooks/survey.js';
import { ACCESS_EXECUTE } from '../../src/machine/machine.js';
import { ExportTable } from '../../src/nt/exports.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { SwitchRecogniser } from '../../src/switches/table.js';
import { type Gva, gfnOf, PAGE_SIZE } from '../../src/vmi/address.js';
import { CLOCK_VECTOR, SteppedGuest } from './stepped-guest.js';

const module = readGuestModule();
const DWORD = 4;
const TEXT_BYTES = 2 * LEXER_PIECE_BYTES;
const TICK_MICROSECONDS = 1000;
const MAX_RUNS = 20_000;

/** Lets the guest run, which is many times as fast as stepping it, until the condition holds. */
function runUntil(guest: SteppedGuest, condition: (report: GuestReport) => boolean): void {
  guest.machine.setTimer(CLOCK_VECTOR, TICK_MICROSECONDS);
  for (let run = 0; run < MAX_RUNS; run++) {
    for (const trap of guest.machine.run(TICK_MICROSECONDS).traps) {
      guest.onTrap(trap);
      guest.machine.complete(trap.vcpu);
    }
    const report = readGuestReport(guest.machine, guest.loaded);
    if (report !== undefined && condition(report)) return;
  }
  throw new Error('the guest does not come to it');
}

/** Runs until the lexer has been through its text once more. */
function pass(guest: SteppedGuest): void {
  const before = guest.report().lexer!.passes;
  runUntil(guest, ({ lexer }) => lexer!.passes > before);
}

function bootWithModule(options: { seed?: number; vcpus?: number; text?: Uint8Array } = {}) {
  const guest = new SteppedGuest({ text: lexerText(1, TEXT_BYTES), ...options });
  runUntil(guest, ({ lexer }) => lexer !== undefined && lexer.passes > 0n);
  return { guest, base: guest.loaded.module!.base };
}

describe('the text of the lexer', () => {
  it('is the same for the same seed only, and as long as asked for', () => {
    expect(lexerText(7, 5000)).toEqual(lexerText(7, 5000));
    expect(lexerText(7, 5000)).not.toEqual(lexerText(8, 5000));
    for (const bytes of [1, 2, 4095, 4096]) expect(lexerText(0, bytes)).toHaveLength(bytes);
  });
});

if (module === undefined) {
  describe.skip('the module of the guest (no .deps/binaries: run npm run binaries)', () =>
    it('is real code'));
} else {
  const image = PeImage.fromFile(module.image);
  const functions = FunctionTable.read(image);
  const pageOf = (rva: number) => Math.floor(rva / PAGE_SIZE);

  describe('the module of the guest', () => {
    it('is in the list of loaded modules, behind NT and the HAL, within reach of a near jump', () => {
      const { guest, base } = bootWithModule();
      const { kernelBase, imageSize } = guest.loaded;
      const head = guest.symbol('PsLoadedModuleList');
      const found: object[] = [];
      for (let entry = guest.readU64(head); entry !== head; entry = guest.readU64(entry)) {
        const name = (at: bigint) => {
          const text = guest.read(guest.readU64(entry + at + 8n), guest.read(entry + at, 2).readUInt16LE());
          return text.toString('utf16le');
        };
        found.push({
          base: guest.readU64(entry + 0x30n),
          entryPoint: guest.readU64(entry + 0x38n),
          size: guest.read(entry + 0x40n, 4).readUInt32LE(),
          path: name(0x48n),
          name: name(0x58n),
        });
        expect(guest.readU64(guest.readU64(entry) + 8n)).toBe(entry);
      }
      expect(found).toEqual([
        {
          base: kernelBase,
          entryPoint: guest.symbol('KiSystemStartup'),
          size: imageSize,
          path: '\\SystemRoot\\system32\\ntoskrnl.exe',
          name: 'ntoskrnl.exe',
        },
        expect.objectContaining({ base: guest.loaded.hal.base, name: 'hal.dll' }),
        {
          base,
          entryPoint: base + BigInt(image.entryPoint),
          size: image.sizeOfImage,
          path: `\\SystemRoot\\System32\\drivers\\${module.name}`,
          name: module.name,
        },
      ]);
      expect(base - kernelBase).toBeLessThan(1n << 31n);
    });

    it('is mapped as its sections say, nothing both writable and executable, and relocated', () => {
      const { guest, base } = bootWithModule();
      const headers = { rva: 0, virtualSize: image.sizeOfHeaders, writable: false, executable: false };
      for (const { rva, virtualSize, writable, executable } of [headers, ...image.sections]) {
        for (let at = rva; at < rva + virtualSize; at += PAGE_SIZE) {
          expect(rights(guest, base + BigInt(at))).toEqual({ writable, executable });
        }
        expect(writable && executable).toBe(false);
      }
      // Two pointers of the language's description.
      const language = base + 0x4a560n;
      expect(guest.readU64(language + 0x90n)).toBe(base + BigInt(module.sites[0]!.functionRva));
      expect(guest.readU64(language + 0x98n)).toBe(base + BigInt(module.sites[1]!.functionRva));
    });

    it.each(module.sites)('has the switch of $name where its list says', (site) => {
      expect(new SwitchRecogniser(image, functions).prove(site.loadRva)).toMatchObject({
        found: true,
        table: site.tableRva,
        entries: site.entries,
        destination: site.dst,
        base: site.base,
        index: site.idx,
        evidence: 'guard',
      });
      expect(functions.entryAt(site.loadRva)?.begin).toBe(site.functionRva);
    });

    it('has functions to hook on every page of these tables', () => {
      const exports = ExportTable.read(image);
      const hooked = module.defaultHooks.map((hook) => {
        const [, name, rva] = /^tree-sitter-c(?:!(\w+)|\+(0x[0-9a-f]+))$/.exec(hook)!;
        return name === undefined ? Number(rva) : exports.rvaOf(name);
      });
      for (const rva of hooked) {
        // What has no unwind data is a load of an address, and RET.
        const end = functions.entryAt(rva)?.end ?? rva + 8;
        const bytes = image.read(rva, end - rva);
        const survey = surveyFunction({ gva: BigInt(rva), bytes, imageBase: 0n }, 5);
        expect(survey?.movedLength).toBeGreaterThanOrEqual(5);
      }
      const pages = new Set(hooked.map(pageOf));
      for (const { tableRva, entries } of module.sites) {
        for (let page = pageOf(tableRva); page <= pageOf(tableRva + entries * DWORD - 1); page++) {
          expect(pages).toContain(page);
        }
      }
    });

    it('is watched by the integrity checker', () => {
      const { guest, base } = bootWithModule();
      const { sweeps } = guest.report().integrity;
      runUntil(guest, ({ integrity }) => integrity.sweeps > sweeps + 1n);
      expect(guest.report().integrity.mismatches).toBe(0n);
      const changed = base + 0x1cefcn;
      const [was] = guest.read(changed, 1);
      guest.write(changed, Buffer.from([was! ^ 1]));
      runUntil(guest, ({ integrity }) => integrity.firstMismatch !== undefined);
      expect(guest.report().integrity.firstMismatch).toMatchObject({ gva: changed, expected: was });
    });
  });

  describe('the lexer of the module', () => {
    it('finds the same in every pass and every guest, and something else in another text', () => {
      const checksums = [
        { seed: 1, vcpus: 1 },
        { seed: 2, vcpus: 2 },
        { seed: 2, vcpus: 2, text: lexerText(2, TEXT_BYTES) },
      ].map((options) => {
        const { guest } = bootWithModule(options);
        pass(guest);
        const { lexer, switches, bugCheck } = guest.report();
        expect(bugCheck).toBeUndefined();
        expect(lexer!.mismatches).toBe(0n);
        expect(lexer!.pieces).toBeGreaterThanOrEqual(2n * lexer!.passes);
        expect(lexer!.tokens).toBeGreaterThan(TEXT_BYTES / 10);
        expect(switches.lexer).toBeGreaterThan(lexer!.tokens);
        return lexer!.checksum;
      });
      expect(checksums[0]).toBe(checksums[1]);
      expect(checksums[2]).not.toBe(checksums[0]);
    });

    it('counts every one of its switches', () => {
      const { guest, base } = bootWithModule();
      const loads = new Set(module.sites.map(({ loadRva }) => base + BigInt(loadRva)));
      for (const { tableRva } of module.sites) trapReads(guest, base + BigInt(tableRva));
      let loaded = 0n;
      guest.onTrap = ({ rip }) => {
        if (loads.has(rip)) loaded++;
      };
      const before = guest.report().switches.lexer;
      pass(guest);
      const counted = guest.report().switches.lexer - before;
      // The one under way at either end may be counted and not loaded yet.
      expect(Number(counted - loaded)).toBeGreaterThanOrEqual(-1);
      expect(Number(counted - loaded)).toBeLessThanOrEqual(1);
      expect(counted).toBeGreaterThan(0n);
    });

    it.each([
      { site: module.sites[0]!, state: 53, other: 120 },
      { site: module.sites[1]!, state: 0, other: 1 },
    ])('notices one table entry of $site.name that is wrong', ({ site, state, other }) => {
      const { guest, base } = bootWithModule();
      const entry = (index: number) => base + BigInt(site.tableRva + index * DWORD);
      guest.write(entry(state), guest.read(entry(other), DWORD));
      runUntil(guest, ({ lexer }) => lexer!.mismatches > 0n);
    });
  });
}

function trapReads(guest: SteppedGuest, gva: Gva): void {
  guest.machine.setAccess(gfnOf(guest.loaded.translate(gva)!), ACCESS_EXECUTE);
}

/** What the guest's page table allows of a page. */
function rights(guest: SteppedGuest, gva: Gva): { writable: boolean; executable: boolean } {
  let entry = guest.loaded.directoryTable;
  for (const shift of [39n, 30n, 21n, 12n]) {
    const table = entry & 0x000f_ffff_ffff_f000n;
    entry = guest.machine.readPhysical(table + ((gva >> shift) & 0x1ffn) * 8n, 8).readBigUInt64LE();
  }
  return { writable: (entry & 2n) !== 0n, executable: entry >> 63n === 0n };
}
