import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { readGuestModule } from '../../src/guest/lexer-module.js';
import { runHost } from '../../src/host/host.js';
import { EventId, PageAccess } from '../../src/host/kvmi-wire.js';
import type { HostStatistics } from '../../src/host/statistics.js';
import { StatisticsClient } from '../../src/host/statistics-client.js';
import { gfnOf, gpaOfFrame, PAGE_SIZE } from '../../src/vmi/address.js';
import { Introspector } from './introspector.js';

const VCPUS = 2;
const MEMORY_MB = 32;
const hasModule = readGuestModule() !== undefined;

let directory: string;
let socket: string;
let tool: Introspector;
let client: StatisticsClient;
let stop: AbortController;
let ended: Promise<void>;

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'memtables-host-'));
  socket = join(directory, 'tool');
  stop = new AbortController();
  tool = await Introspector.listen(socket);
  const accepted = tool.accept();
  ended = runHost({ socket, vcpus: VCPUS, memoryMB: MEMORY_MB, seed: 7, signal: stop.signal });
  ended.catch(() => {});
  await accepted;
  client = await StatisticsClient.connect(`${socket}.stats`);
});

afterEach(async () => {
  stop.abort();
  await ended;
  client.close();
  tool.close();
  rmSync(directory, { recursive: true, force: true });
});

async function until(condition: (statistics: HostStatistics) => boolean): Promise<HostStatistics> {
  for (;;) {
    const statistics = await client.statistics();
    if (condition(statistics)) return statistics;
    await sleep(10);
  }
}

/** The frames of the image's pages, found the way only a test may: by their bytes. */
async function framesOf(image: Buffer, pages: readonly number[]): Promise<bigint[]> {
  const frames: bigint[] = [];
  for (let gfn = 0n; gfn < BigInt((MEMORY_MB << 20) / PAGE_SIZE); gfn++) {
    const { data } = await tool.read(gpaOfFrame(gfn), BigInt(PAGE_SIZE));
    if (pages.some((page) => data.equals(image.subarray(page, page + PAGE_SIZE)))) frames.push(gfn);
  }
  return frames;
}

describe('a host', () => {
  it('without the module has nothing of it', async () => {
    const bare = new AbortController();
    const own = join(directory, 'bare');
    const running = runHost({
      ...{ socket: own, vcpus: 1, memoryMB: MEMORY_MB, seed: 7 },
      module: false,
      signal: bare.signal,
    });
    await until(({ guest }) => (guest?.switches['one-level'] ?? 0) > 0);
    const bareClient = await StatisticsClient.connect(`${own}.stats`);
    const [image, kernelOnly] = [await client.image(), await bareClient.image()];
    bare.abort();
    await running;
    bareClient.close();
    expect(image.length > kernelOnly.length).toBe(hasModule);
  });

  it('boots its guest, which reports to the statistics channel and finds nothing wrong', async () => {
    const { guest, ...host } = await until((now) => (now.guest?.integritySweeps ?? 0) > 0);
    expect(host).toMatchObject({ vcpus: VCPUS, seed: 7, attached: true, outstandingEvents: 0 });
    expect(host.violations).toMatchObject({ read: 0, sites: [] });
    expect(guest!.switches['one-level']).toBeGreaterThan(0);
    expect(guest).toMatchObject({ integrityMismatches: 0, userErrors: 0 });
    expect(guest!.bugCheck).toBeUndefined();
  });

  it('says nothing that docs/host-statistics.md does not explain', async () => {
    const text = readFileSync(new URL('../../docs/host-statistics.md', import.meta.url), 'utf8');
    const all = await until(({ guest }) => guest !== undefined && (guest.lexer !== undefined || !hasModule));
    const { violations, pageFaults, guest } = all;
    const [stream, processor] = [guest!.streams[0]!, guest!.processors[0]!];

    for (const part of [all, violations, pageFaults, guest!, guest!.lexer ?? {}, stream, processor]) {
      for (const field of Object.keys(part)) expect(text, field).toMatch(new RegExp(`[\`".]${field}[\`"]`));
    }
  });

  it('its image is whole and does not change by itself', async () => {
    await until((now) => now.guest !== undefined);
    const before = await client.image();
    await until((now) => (now.guest?.integritySweeps ?? 0) > 0);
    expect(before.equals(await client.image())).toBe(true);
    expect(before.subarray(0, 2).toString()).toBe('MZ');
  });

  it('trapped table loads are counted by site; the guest computes on; a pause stops it', async () => {
    await until((now) => (now.guest?.integritySweeps ?? 0) > 0);
    const { sites } = readGuestArtefacts().sites;
    const tables = new Set(sites.map((site) => site.tableRva & ~(PAGE_SIZE - 1)));
    const image = await client.image();
    // Paused, the guest takes no time from the search.
    await tool.pauseAll(VCPUS);
    const standingStill = [await tool.event(), await tool.event()];
    const frames = await framesOf(image, [...tables]);
    for (const event of standingStill) tool.answer(event);
    expect(frames.length).toBeGreaterThanOrEqual(tables.size);
    for (let vcpu = 0; vcpu < VCPUS; vcpu++) await tool.enable(vcpu, EventId.PF);
    for (const gfn of frames) await tool.setAccess({ gpa: gpaOfFrame(gfn), access: PageAccess.EXECUTE });
    for (let answered = 0; answered < 200; answered++) {
      const event = await tool.event();
      expect(frames).toContain(gfnOf(event.pageFault!.gpa));
      tool.answer(event);
    }
    const { violations, guest } = await client.statistics();
    expect(violations.read).toBeGreaterThanOrEqual(200);
    const counted = violations.sites.reduce((sum, site) => sum + site.violations, 0);
    expect(counted + violations.otherReads).toBe(violations.read);
    expect(guest).toMatchObject({ integrityMismatches: 0 });

    for (const gfn of frames) await tool.setAccess({ gpa: gpaOfFrame(gfn), access: PageAccess.ALL });
    await tool.pauseAll(VCPUS);
    const paused = [];
    while (paused.length < VCPUS) {
      const event = await tool.event();
      if (event.event === EventId.PAUSE_VCPU) paused.push(event);
      else tool.answer(event);
    }
    const standing = await client.statistics();
    expect(standing).toMatchObject({ paused: [true, true], outstandingEvents: VCPUS, restrictedFrames: 0 });
    await sleep(20);
    expect((await client.statistics()).guest!.switches).toEqual(standing.guest!.switches);
    for (const event of paused) tool.answer(event);
    await until(({ guest }) => guest!.switches['one-level'] > standing.guest!.switches['one-level']);
  });

  it('ends while a tool stands in an event, and leaves no socket behind', async () => {
    await tool.pauseAll(VCPUS);
    await tool.event();
    stop.abort();
    await ended;
    await tool.disconnected();
    await expect(StatisticsClient.connect(`${socket}.stats`)).rejects.toMatchObject({
      code: 'HYPERVISOR_GONE',
    });
    await expect(client.statistics()).rejects.toMatchObject({ code: 'HYPERVISOR_GONE' });
  });
});
