import { existsSync, readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import type { SwitchSite as DeclaredSite, RefusalHazard } from '../../src/guest/artefacts.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { scanImage } from '../../src/switches/scan.js';
import { SwitchRecogniser } from '../../src/switches/table.js';

const IMAGE = 'build/guest/ntoskrnl.exe';
const SITES = 'build/guest/sites.json';

/** Hazards that the place of a load makes, not its form: the engine refuses those, not the recogniser. */
const OF_PLACE: ReadonlySet<RefusalHazard> = new Set([
  'system-service-table',
  'pageable',
  'discardable',
  'initkdbg',
  'kvascode',
]);

if (!existsSync(IMAGE)) {
  it.skip('the guest image (not built: run npm run setup)');
} else {
  const image = PeImage.fromFile(readFileSync(IMAGE));
  const recogniser = new SwitchRecogniser(image, FunctionTable.read(image));
  const sites: DeclaredSite[] = JSON.parse(readFileSync(SITES, 'utf8')).sites;
  const relocatable = sites.filter(({ expected }) => expected === 'relocatable');
  const lookAlikes = sites.filter(
    ({ expected }) => expected !== 'relocatable' && !OF_PLACE.has(expected as RefusalHazard),
  );

  describe('the guest image', () => {
    it('has sites of both kinds', () => {
      expect(relocatable.length).toBeGreaterThan(20);
      expect(lookAlikes.length).toBeGreaterThan(5);
    });

    it.each(relocatable)('$name is proven with its $entries entries', (site) => {
      const proof = recogniser.prove(site.loadRva);
      const bytes = site.byteTableRva === undefined ? [] : image.read(site.byteTableRva, site.byteEntries!);
      // A byte table that never names the last entries bounds the index more closely than the table's size.
      const entries = bytes.length === 0 ? site.entries : Math.max(...bytes) + 1;
      expect(entries).toBeLessThanOrEqual(site.entries);
      expect(proof).toMatchObject({
        found: true,
        form: site.form,
        table: site.tableRva,
        entries,
        base: site.base,
        index: site.idx,
        destination: site.dst,
      });
      if (site.byteTableRva === undefined) return;
      expect(proof).toMatchObject({
        byteTable: {
          rva: site.byteLoadRva,
          table: site.byteTableRva,
          entries: site.byteEntries,
          index: site.byteIdx,
        },
      });
    });

    it.each(lookAlikes)('$name is refused: $expected', (site) => {
      expect(recogniser.prove(site.loadRva)).toMatchObject({ found: false });
    });

    it('a scan finds every relocatable site', () => {
      const found = new Map(scanImage(image).map((site) => [site.rva, site.found]));
      for (const { loadRva, name } of relocatable) expect(found.get(loadRva), name).toBe(true);
      for (const { loadRva, name } of lookAlikes) expect(found.get(loadRva) ?? false, name).toBe(false);
    });
  });
}
