import { strict as assert } from 'node:assert';
import { READ_8, resultOf, VCPUS } from '../watched-guest.js';
import { ACCESS, answer, type Check, nextLines, RESPOND, watch } from './bench.js';

const TIMES = 20;

export const PAUSING: readonly Check[] = [
  {
    name: 'a guest stands still as often paused as it is to be resumed',
    async run(bench) {
      const program = await bench.attach();
      assert.equal(await program.result('pause'), '0');
      assert.equal(await program.result('pause'), '0');
      await bench.allStandStill();
      assert.equal(await program.result('resume'), '0');
      await bench.allStandStill();
      assert.equal(await program.result('resume'), '0');
      await bench.allGoOn();
    },
  },
  {
    name: 'a guest that is not paused is not touched by a resume, and can be paused afterwards',
    async run(bench) {
      const program = await bench.attach();
      await program.run('resume');
      await program.run('resume');
      await bench.allGoOn();
      assert.equal(await program.result('pause'), '0');
      await bench.allStandStill();
      assert.equal(await program.result('resume'), '0');
    },
  },
  {
    name: `a guest stops and goes on again and again: ${TIMES} times`,
    async run(bench) {
      const program = await bench.attach();
      for (let time = 0; time < TIMES; time++) {
        assert.equal(await program.result('pause'), '0');
        assert.equal(await program.result('resume'), '0');
      }
      await bench.allGoOn();
    },
  },
  {
    name: 'memory can be read and changed while the guest stands still',
    async run(bench) {
      const program = await bench.attach();
      await program.run('pause');
      await program.run('flush');
      const passes = bench.read(resultOf(0, 'passes'), 8).toString('hex');
      assert.equal(await program.result(`read ${resultOf(0, 'passes')} 8`), `0 8 ${passes}`);
      assert.equal(await program.result(`write ${resultOf(0, 'detours')} 0000000000000000`), '0 8');
      assert.equal(bench.result(0, 'detours'), 0n);
      await program.run('resume');
    },
  },
  {
    name: 'a guest with a violation that was raised before the pause is resumed with it, and it is answered',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions respond ${RESPOND.emulate}`);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await answer(program, 1);
      await program.run('pause');
      await program.run('resume');
      const seen = new Set<number>();
      for (let i = 0; i < 50 && seen.size < VCPUS; i++)
        for (const { vcpu } of await answer(program, 1)) seen.add(vcpu);
      assert.equal(seen.size, VCPUS);
      await bench.detach(program);
      await bench.allGoOn();
    },
  },
  {
    name: 'a guest may be paused inside a callback, and is resumed after it',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions pause respond ${RESPOND.emulate}`);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      const events = await nextLines(program);
      const pauses = events.filter((line) => line === 'in pause 0').length;
      assert.notEqual(pauses, 0);
      await bench.allStandStill();
      await program.run(`actions respond ${RESPOND.emulate}`);
      for (let i = 0; i < pauses; i++) assert.equal(await program.result('resume'), '0');
      await answer(program, 2 * VCPUS);
    },
  },
];
