import { strict as assert } from 'node:assert';
import { MEMORY_MB, READ_8, VCPUS } from '../watched-guest.js';
import { ACCESS, answer, type Check, INIT, NO_ERROR, RESPOND, watch } from './bench.js';

const VM_NOT_FOUND = '1 error=3';
/** By the driver, says libvmi; its events, says ours. */
export const REFUSED = /^1 error=[26]$/;
const UNKNOWN_MODE = 99;
const CYCLES = 20;

export const ATTACHING: readonly Check[] = [
  {
    name: 'the events have version 9',
    async run(bench) {
      assert.equal(await bench.load().result('version'), '9');
    },
  },
  {
    name: 'attaching to a domain that does not exist says so, and can be tried again',
    async run(bench) {
      await bench.boot();
      const program = bench.load();
      assert.equal(await bench.init(program, undefined, 'nobody'), VM_NOT_FOUND);
      assert.equal(await bench.init(program), NO_ERROR, program.stderr);
    },
  },
  {
    name: 'attaching refuses a mode that does not exist, and flags that do not name exactly one guest',
    async run(bench) {
      await bench.boot();
      const program = bench.load();
      assert.equal(await bench.init(program, undefined, undefined, UNKNOWN_MODE), '1 error=0');
      assert.equal(await bench.init(program, INIT.events), VM_NOT_FOUND);
      assert.equal(await bench.init(program, INIT.name | INIT.id | INIT.events), VM_NOT_FOUND);
    },
  },
  {
    name: 'attaching tells the number of vCPUs, and an end of memory behind all of it',
    async run(bench) {
      const program = await bench.attach();
      const [vcpus, size, end] = (await program.result('size')).split(' ');
      assert.equal(Number(vcpus), VCPUS);
      assert(Number(size) > 0, `a size of ${size}`);
      assert(Number(end) >= MEMORY_MB * 2 ** 20, `an end of ${end}`);
    },
  },
  {
    name: 'attaching leaves events alone when they were not asked for',
    async run(bench) {
      const program = await bench.attach(INIT.name);
      assert.equal(await program.result(`watch 0 ${READ_8.gfn} ${ACCESS.readWrite}`), '1');
      assert.equal(await program.result('listen 0'), '1');
      assert.equal(await program.result('pending'), '-1');
      const bytes = bench.read(READ_8.gpa, 8).toString('hex');
      assert.equal(await program.result(`read ${READ_8.gpa} 8`), `0 8 ${bytes}`);
      await bench.allGoOn();
    },
  },
  {
    name: 'attaching a second program with events is refused, and disturbs neither the first nor the guest',
    async run(bench) {
      const first = await bench.attach();
      assert.match(await bench.init(bench.load()), REFUSED);
      await first.run(`actions respond ${RESPOND.emulate}`);
      await watch(first, 0, READ_8, ACCESS.readWrite);
      await answer(first, 2 * VCPUS);
      await bench.detach(first);
      await bench.allGoOn();
    },
  },
  {
    name: `attaching works again and again after a destroy, with a trap each time: ${CYCLES} times by one program`,
    async run(bench) {
      await bench.boot();
      const program = bench.load();
      await program.run(`actions respond ${RESPOND.emulate}`);
      for (let cycle = 0; cycle < CYCLES; cycle++) {
        assert.equal(await bench.init(program), NO_ERROR, program.stderr);
        await watch(program, 0, READ_8, ACCESS.readWrite);
        await answer(program, 2);
        await bench.detach(program);
      }
      await bench.allGoOn();
    },
  },
];
