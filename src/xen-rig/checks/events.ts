import { strict as assert } from 'node:assert';
import { pageOffset } from '../../vmi/address.js';
import {
  CALLED,
  READ_4,
  READ_8,
  STRING,
  VCPUS,
  type WatchedPage,
  WRITTEN,
  WRITTEN_STRIDE,
} from '../watched-guest.js';
import { ACCESS, answer, answerUntil, type Check, nextEvents, nextLines, RESPOND, watch } from './bench.js';

const MANY = 200;
const EMULATE = `actions respond ${RESPOND.emulate}`;

function reports(name: string, page: WatchedPage, trapped: number, access: number, stride = 0n): Check {
  return {
    name: `a violation tells where it was: ${name}`,
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      await watch(program, 3, page, trapped);
      for (const event of await answer(program, 2 * VCPUS)) {
        const gva = page.gva + BigInt(event.vcpu) * stride;
        assert.equal(event.slot, 3);
        assert.equal(event.gfn, page.gfn);
        assert.equal(event.access & access, access);
        assert.equal(event.gla, gva);
        assert.equal(event.gla_valid, 1n);
        assert.equal(event.offset, BigInt(pageOffset(gva)));
        assert.equal(event.rip, page.rip);
        assert.equal(event.cr3, bench.guest.pageTable);
      }
    },
  };
}

export const EVENTS: readonly Check[] = [
  reports('a read', READ_8, ACCESS.readWrite, ACCESS.read),
  reports('a write', WRITTEN, ACCESS.readWrite, ACCESS.write, WRITTEN_STRIDE),
  reports('a write, where reads are not trapped', WRITTEN, ACCESS.write, ACCESS.write, WRITTEN_STRIDE),
  {
    name: 'a violation tells where it was: an instruction that is fetched',
    async run(bench) {
      const program = await bench.attach();
      await watch(program, 0, CALLED, ACCESS.execute);
      const [event] = await nextEvents(program);
      assert.equal(event!.access & ACCESS.execute, ACCESS.execute);
      assert.deepEqual([event!.gfn, event!.gla, event!.rip], [CALLED.gfn, CALLED.gva, CALLED.rip]);
      await bench.detach(program);
      await bench.allGoOn();
    },
  },
  {
    name: 'a frame that is not accessed raises nothing, and listening ends with its timeout',
    async run(bench) {
      const program = await bench.attach();
      assert.equal(await program.result(`watch 0 ${READ_8.gfn + 1n} ${ACCESS.readWrite}`), '0');
      assert.deepEqual(await program.run('listen 0'), { result: '0', events: [] });
      assert.deepEqual(await program.run('listen 200'), { result: '0', events: [] });
      assert.equal(await program.result('pending'), '0');
      await bench.allGoOn();
    },
  },
  {
    name: `violations of all vCPUs are answered, and each access goes through: ${MANY} by EMULATE`,
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      const before = bench.ofEach('passes');
      const events = await answer(program, MANY);
      for (let vcpu = 0; vcpu < VCPUS; vcpu++) {
        const own = events.filter((event) => event.vcpu === vcpu).length;
        const passes = Number(bench.result(vcpu, 'passes') - before[vcpu]!);
        // What was under way, at the beginning and at the end.
        assert(Math.abs(own - passes) <= 1, `vCPU ${vcpu}: ${own} violations in ${passes} passes`);
      }
      assert.equal(bench.result(0, 'seen8'), bench.read(READ_8.gpa, 8).readBigUInt64LE());
    },
  },
  {
    name: 'a violation that is answered with nothing is raised again by the same instruction',
    async run(bench) {
      const program = await bench.attach();
      await watch(program, 0, READ_8, ACCESS.readWrite);
      const there = new Set<number>();
      while (there.size < VCPUS) for (const { vcpu } of await nextEvents(program)) there.add(vcpu);
      const before = bench.ofEach('passes');
      for (const { rip } of await answer(program, 4 * VCPUS)) assert.equal(rip, READ_8.rip);
      assert.deepEqual(bench.ofEach('passes'), before);
      await program.run(EMULATE);
      await answerUntil(program, () => bench.ofEach('passes').every((count, vcpu) => count > before[vcpu]!));
    },
  },
  {
    name: 'a violation may change the registers that its instruction goes on with',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions set-rcx 0x4444 respond ${RESPOND.setRegisters | RESPOND.emulate}`);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await answerUntil(program, () => bench.result(0, 'seenRcx') === 0x4444n);
      await answerUntil(program, () => bench.result(1, 'seenRcx') === 0x4444n);
      await bench.detach(program);
      await bench.allGoOn();
      await bench.until(() => bench.result(0, 'seenRcx') === 0n, 'RCX stays what it was set to');
    },
  },
  {
    name: 'a violation may be handled with reads of memory',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions read ${READ_8.gpa} respond ${RESPOND.emulate}`);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      assert.equal((await nextLines(program))[1], 'in read 0');
    },
  },
  {
    name: 'a write that is answered with EMULATE_NOWRITE is left out',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions respond ${RESPOND.emulateNoWrite}`);
      await watch(program, 0, WRITTEN, ACCESS.readWrite);
      await answer(program, VCPUS);
      const before = bench.read(WRITTEN.gpa, 8);
      await answer(program, 4 * VCPUS);
      assert(bench.read(WRITTEN.gpa, 8).equals(before));
      await program.run(EMULATE);
      await answerUntil(program, () => !bench.read(WRITTEN.gpa, 8).equals(before));
    },
  },
  {
    name: 'two frames have events of their own',
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await watch(program, 1, READ_4, ACCESS.readWrite);
      const events = await answer(program, 6 * VCPUS);
      for (const { slot, rip } of events) assert.equal(rip, [READ_8, READ_4][slot]!.rip);
      assert.equal(new Set(events.map(({ slot }) => slot)).size, 2);
      assert.equal(await program.result('clear 0'), '0');
      for (const { slot } of (await answer(program, 6 * VCPUS)).slice(VCPUS)) assert.equal(slot, 1);
    },
  },
  {
    name: 'a frame has one event, and reads are not trapped without writes',
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      assert.equal(await program.result(`watch 0 ${READ_8.gfn} ${ACCESS.read}`), '1');
      await watch(program, 0, READ_8, ACCESS.readWrite);
      assert.equal(await program.result(`watch 1 ${READ_8.gfn} ${ACCESS.readWrite}`), '1');
      assert.equal(await program.result(`watch-all 1 ${ACCESS.readWrite}`), '1');
      await answer(program, VCPUS);
    },
  },
  {
    name: 'an event of another version or of an unknown type is refused',
    async run(bench) {
      const program = await bench.attach();
      for (const typeAndVersion of ['1 8', '1 10', '99 9'])
        assert.equal(await program.result(`watch-type 0 ${typeAndVersion}`), '1');
    },
  },
  {
    name: 'a generic event handles every frame whose access was set, and nothing can be set without it',
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      const trap = (page: WatchedPage, access: number) => program.result(`trap ${page.gfn} ${access}`);
      assert.equal(await trap(READ_8, ACCESS.readWrite), '1');
      assert.equal(await program.result(`watch-all 0 ${ACCESS.readWrite}`), '0');
      assert.equal(await program.result(`watch-all 1 ${ACCESS.readWrite}`), '1');
      assert.equal(await program.result(`watch 1 ${READ_4.gfn} ${ACCESS.readWrite}`), '1');
      assert.equal(await trap(READ_8, ACCESS.readWrite), '0');
      assert.equal(await trap(STRING, ACCESS.readWrite), '0');
      const rips = new Set((await answer(program, 6 * VCPUS)).map(({ rip }) => rip));
      assert.deepEqual(rips, new Set([READ_8.rip, STRING.rip]));
      assert.equal(await trap(STRING, ACCESS.none), '0');
      const later = (await answer(program, 6 * VCPUS)).slice(VCPUS);
      assert(later.every(({ rip }) => rip === READ_8.rip));
      assert.equal(await trap(READ_8, ACCESS.none), '0');
      await program.run('listen 0');
      await bench.allGoOn();
      assert.equal(await program.result('clear 0'), '0');
      assert.equal(await trap(READ_8, ACCESS.readWrite), '1');
    },
  },
  {
    name: 'a violation that no callback handles stops its vCPU until the session ends',
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      await program.run(`watch-all 0 ${ACCESS.readWrite}`);
      await program.run(`trap ${READ_8.gfn} ${ACCESS.readWrite}`);
      assert.equal(await program.result('clear 0'), '0');
      await bench.allStandStill();
      for (let i = 0; i < 4; i++) assert.deepEqual((await program.run('listen 200')).events, []);
      await bench.allStandStill();
      await bench.detach(program);
      await bench.allGoOn();
    },
  },
  {
    name: 'an event that is cleared gives the frame all its permissions back, and can be registered again',
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await answer(program, VCPUS);
      assert.deepEqual((await program.run('clear 0')).events, ['freed slot=0 status=0']);
      // What was raised before may still have to be let go.
      await program.run(`watch-all 1 ${ACCESS.readWrite}`);
      await program.run('listen 0');
      await bench.allGoOn();
      assert.deepEqual(await program.run('listen 200'), { result: '0', events: [] });
      await program.run('clear 1');
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await answer(program, VCPUS);
    },
  },
  {
    name: 'an event that is cleared inside its callback is gone once listen returns',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions clear 0 clear 0 respond ${RESPOND.emulate}`);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      const events = await nextLines(program);
      assert.deepEqual(events.slice(1, 3), ['in clear 0', 'in clear 1']);
      assert.equal(events.at(-1), 'freed slot=0 status=0');
      await bench.allGoOn();
      assert.deepEqual(await program.run('listen 200'), { result: '0', events: [] });
    },
  },
  {
    name: 'a write through the library to a watched frame is no violation',
    async run(bench) {
      const program = await bench.attach();
      assert.equal(await program.result(`watch 0 ${READ_8.gfn + 1n} ${ACCESS.readWrite}`), '0');
      assert.equal(await program.result(`write ${(READ_8.gfn + 1n) << 12n} aabb`), '0 2');
      assert.deepEqual(await program.run('listen 200'), { result: '0', events: [] });
    },
  },
  {
    name: 'a negative timeout is refused',
    notByLibvmi: 'libvmi takes it on Xen',
    async run(bench) {
      const program = await bench.attach();
      for (const timeout of ['0x80000000', '0xffffffff'])
        assert.equal(await program.result(`listen ${timeout}`), '1');
    },
  },
  {
    name: 'listening and destroying inside a callback are refused',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions listen destroy respond ${RESPOND.emulate}`);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      const events = await nextLines(program);
      assert.deepEqual(events.slice(1, 3), ['in listen 1', 'in destroy 1']);
    },
  },
];
