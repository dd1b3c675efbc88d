import { strict as assert } from 'node:assert';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Gfn, Gpa, Gva } from '../../vmi/address.js';
import { AbiProgram } from '../abi-program.js';
import { createDomain, destroyDomain } from '../domain.js';
import { DomainMemory } from '../domain-memory.js';
import { MEMORY_MB, resultOf, VCPUS, type WatchedPage, watchedGuest } from '../watched-guest.js';

/** What a library with libvmi's C ABI has to do on Xen. */
export interface Check {
  readonly name: string;
  /** Why libvmi itself does otherwise. */
  readonly notByLibvmi?: string;
  /** Throws where it does not hold; returns the reason where it cannot be shown here. */
  run(bench: Bench): Promise<string | undefined> | Promise<void>;
}

export interface MemoryEvent {
  readonly slot: number;
  readonly vcpu: number;
  readonly gfn: Gfn;
  readonly access: number;
  readonly gla: Gva;
  readonly offset: bigint;
  readonly rip: Gva;
  readonly cr3: Gpa;
  readonly efer: bigint;
  readonly gla_valid: bigint;
}

export const DOMAIN = 'watched';
export const INIT = { name: 1, id: 2, events: 4 } as const;
export const ACCESS = { none: 1, read: 2, write: 4, execute: 8, readWrite: 6 } as const;
export const RESPOND = { emulate: 2, emulateNoWrite: 4, setRegisters: 128 } as const;
export const NO_ERROR = '0 error=0';
const XEN = 0;
const NOBODY = '-';
const PATIENCE_MS = 20_000;
const LISTEN_MS = 10_000;
const STILL_MS = 300;
const POLL_MS = 20;
const QUADWORD = 8;

/** The domain that is watched, and the programs that watch it. */
export class Bench {
  readonly guest = watchedGuest();
  #memory: DomainMemory | undefined;
  #programs: AbiProgram[] = [];
  readonly #attached = new Set<AbiProgram>();

  constructor(
    private readonly program: string,
    private readonly library: string,
    private readonly folder: string,
  ) {}

  /** A program that has loaded the library and not attached yet. */
  load(): AbiProgram {
    const program = new AbiProgram(this.program, this.library);
    this.#programs.push(program);
    return program;
  }

  /** As `vmi_init` answers. */
  async init(
    program: AbiProgram,
    flags: number = INIT.name | INIT.events,
    domain: string = DOMAIN,
    mode = XEN,
  ): Promise<string> {
    const status = await program.result(`init ${NOBODY} ${flags} ${mode} ${domain}`);
    if (status === NO_ERROR) this.#attached.add(program);
    return status;
  }

  /** A program that is attached to the domain, which runs. */
  async attach(flags?: number): Promise<AbiProgram> {
    await this.boot();
    const program = this.load();
    assert.equal(await this.init(program, flags), NO_ERROR, program.stderr);
    return program;
  }

  async detach(program: AbiProgram): Promise<void> {
    this.#attached.delete(program);
    assert.equal(await program.result('destroy'), '0');
  }

  /** Kills a program as it stands. */
  async kill(program: AbiProgram): Promise<void> {
    this.#attached.delete(program);
    this.#programs = this.#programs.filter((other) => other !== program);
    assert.equal(await program.kill(), 'SIGKILL');
  }

  /** Has the domain run, a new one if there is none. */
  async boot(): Promise<void> {
    if (this.#memory !== undefined) return;
    const { kernel } = this.guest;
    this.#memory = new DomainMemory(
      // It never rests: only what dom0 leaves of the processor is for it.
      createDomain({ name: DOMAIN, kernel, vcpus: VCPUS, memoryMB: MEMORY_MB }, this.folder),
    );
    await this.allGoOn();
  }

  /** Ends the domain at once. */
  destroyDomain(): void {
    if (this.#memory === undefined) return;
    this.#memory = undefined;
    destroyDomain(DOMAIN);
  }

  /** Ends what a check has left running; throws when it does not end in order. */
  async endPrograms(): Promise<void> {
    for (const program of this.#attached) await this.detach(program);
    const ends = await Promise.all(this.#programs.splice(0).map((program) => program.end()));
    assert.deepEqual(
      ends.filter((end) => end !== 0),
      [],
    );
  }

  /** After a check that failed, nothing of it may disturb the next. */
  async cleanUp(): Promise<void> {
    this.#attached.clear();
    await Promise.all(this.#programs.splice(0).map((program) => program.kill()));
    this.destroyDomain();
  }

  /** Past the library. */
  read(gpa: Gpa, length: number): Buffer {
    assert(this.#memory !== undefined);
    return this.#memory.readPhysical(gpa, length);
  }

  result(vcpu: number, result: Parameters<typeof resultOf>[1]): bigint {
    return this.read(resultOf(vcpu, result), QUADWORD).readBigUInt64LE();
  }

  /** By vCPU. */
  ofEach(result: Parameters<typeof resultOf>[1]): bigint[] {
    return Array.from({ length: VCPUS }, (_, vcpu) => this.result(vcpu, result));
  }

  /** The vCPU comes around at least twice: once at least all of what it does was begun after the call. */
  async goesOn(vcpu: number): Promise<void> {
    const before = this.result(vcpu, 'passes');
    await this.until(() => this.result(vcpu, 'passes') >= before + 2n, `vCPU ${vcpu} stands still`);
  }

  async allGoOn(): Promise<void> {
    for (let vcpu = 0; vcpu < VCPUS; vcpu++) await this.goesOn(vcpu);
  }

  async allStandStill(): Promise<void> {
    const before = this.ofEach('passes');
    await sleep(STILL_MS);
    assert.deepEqual(this.ofEach('passes'), before, 'a vCPU goes on');
  }

  async until(condition: () => boolean, otherwise: string): Promise<void> {
    const end = performance.now() + PATIENCE_MS;
    while (!condition()) {
      if (performance.now() > end) assert.fail(otherwise);
      await sleep(POLL_MS);
    }
  }
}

/** Registers slot `slot` for the frame of `page`. */
export async function watch(program: AbiProgram, slot: number, page: WatchedPage, access: number) {
  assert.equal(await program.result(`watch ${slot} ${page.gfn} ${access}`), '0', program.stderr);
}

/** What callbacks print when events come next. Listening may end with none, and before its time. */
export async function nextLines(program: AbiProgram): Promise<readonly string[]> {
  const end = performance.now() + PATIENCE_MS;
  while (performance.now() < end) {
    const { result, events } = await program.run(`listen ${LISTEN_MS}`);
    assert.equal(result, '0', program.stderr);
    if (events.length > 0) return events;
  }
  return assert.fail('no event comes');
}

/** The next events that come, one at least. */
export async function nextEvents(program: AbiProgram): Promise<MemoryEvent[]> {
  return (await nextLines(program)).flatMap(memoryEvent);
}

/** Has at least `count` events answered as the actions say. */
export async function answer(program: AbiProgram, count: number): Promise<MemoryEvent[]> {
  const events: MemoryEvent[] = [];
  while (events.length < count) events.push(...(await nextEvents(program)));
  return events;
}

/** Has events answered as the actions say until `done`. */
export async function answerUntil(program: AbiProgram, done: () => boolean): Promise<void> {
  const end = performance.now() + PATIENCE_MS;
  while (!done()) {
    if (performance.now() > end) assert.fail('the guest does not come so far');
    await nextEvents(program);
  }
}

function memoryEvent(line: string): MemoryEvent[] {
  if (!line.startsWith('event memory ')) return [];
  const fields = Object.fromEntries(
    [...line.matchAll(/(\w+)=(\w+)/g)].map(([, name, value]) => [name, BigInt(value!)]),
  ) as Record<keyof MemoryEvent, bigint>;
  return [
    {
      ...fields,
      slot: Number(fields.slot),
      vcpu: Number(fields.vcpu),
      access: Number(fields.access),
    },
  ];
}

export function quadword(value: bigint): string {
  const bytes = Buffer.alloc(QUADWORD);
  bytes.writeBigUInt64LE(value);
  return bytes.toString('hex');
}
