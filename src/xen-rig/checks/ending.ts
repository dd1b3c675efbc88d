import { strict as assert } from 'node:assert';
import { READ_8, VCPUS, WRITTEN } from '../watched-guest.js';
import { REFUSED } from './attaching.js';
import { ACCESS, answer, type Bench, type Check, INIT, nextEvents, RESPOND, watch } from './bench.js';

const EMULATE = `actions respond ${RESPOND.emulate}`;
const STAYS_PAUSED = 'a guest that its caller has paused is left paused by libvmi';

/** Nothing of a session is left: another one has nothing to report. */
async function leavesNothing(bench: Bench): Promise<void> {
  await bench.allGoOn();
  const program = await bench.attach();
  assert.equal(await program.result(`watch-all 0 ${ACCESS.readWrite}`), '0');
  await bench.allGoOn();
  assert.deepEqual(await program.run('listen 200'), { result: '0', events: [] });
  await bench.detach(program);
}

export const ENDING: readonly Check[] = [
  {
    name: 'destroying leaves no trap: frames that are watched are given back',
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await watch(program, 1, WRITTEN, ACCESS.readWrite);
      await answer(program, 4);
      await bench.detach(program);
      await leavesNothing(bench);
    },
  },
  {
    name: 'destroying lets vCPUs go whose violations were not answered',
    async run(bench) {
      const program = await bench.attach();
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await bench.allStandStill();
      await bench.detach(program);
      await leavesNothing(bench);
    },
  },
  {
    name: 'destroying lets a guest run that is paused, however often',
    notByLibvmi: STAYS_PAUSED,
    async run(bench) {
      const program = await bench.attach();
      for (let time = 0; time < 3; time++) assert.equal(await program.result('pause'), '0');
      await bench.detach(program);
      await leavesNothing(bench);
    },
  },
  {
    name: 'destroying without events lets a guest run that is paused',
    notByLibvmi: STAYS_PAUSED,
    async run(bench) {
      const program = await bench.attach(INIT.name);
      await program.run('pause');
      await bench.allStandStill();
      await bench.detach(program);
      await bench.allGoOn();
    },
  },
  {
    name: 'a domain that is destroyed fails listening and every call after it, and destroying the session ends',
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await answer(program, VCPUS);
      bench.destroyDomain();
      // What it had raised before may come first.
      for (let i = 0; i < 4 && (await program.result('listen 1000')) === '0'; i++);
      await program.run('flush');
      const failures = {
        'listen 1000': '1',
        [`read ${READ_8.gpa} 4`]: '1 0 ',
        [`write ${READ_8.gpa} aa`]: '1 0',
        'set-registers 0': '1',
        [`watch 1 ${WRITTEN.gfn} ${ACCESS.readWrite}`]: '1',
        'paging 0': '1',
      };
      const results: Record<string, string> = {};
      for (const command of Object.keys(failures)) results[command] = await program.result(command);
      assert.deepEqual(results, failures);
      assert.match(await program.result('registers 0'), /^1 /);
      await bench.detach(program);
      assert.equal(await bench.init(bench.load()), '1 error=3');
    },
  },
  {
    name: 'a domain that is destroyed while it is paused, with a violation unanswered, does not keep destroy',
    async run(bench) {
      const program = await bench.attach();
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await bench.allStandStill();
      await program.run('pause');
      bench.destroyDomain();
      await bench.detach(program);
    },
  },
  {
    name: 'a program that is killed leaves the guest watched; the domain can be started anew, and be watched',
    async run(bench) {
      const program = await bench.attach();
      await program.run(EMULATE);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await nextEvents(program);
      await bench.kill(program);
      const next = bench.load();
      assert.match(await bench.init(next), REFUSED);
      bench.destroyDomain();
      await bench.boot();
      assert.equal(await bench.init(next), '0 error=0', next.stderr);
      await next.run(EMULATE);
      await watch(next, 0, READ_8, ACCESS.readWrite);
      await answer(next, VCPUS);
    },
  },
];
