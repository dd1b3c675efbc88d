import { strict as assert } from 'node:assert';
import { VCPUS } from '../watched-guest.js';
import type { Check } from './bench.js';

const NO_TRAP_FLAG = 'the processor has no monitor trap flag, by which Xen steps';

export const STEPS: readonly Check[] = [
  {
    name: 'single steps of no vCPU are not registered',
    async run(bench) {
      assert.equal(await (await bench.attach()).result('watch-steps 0 0'), '1');
    },
  },
  {
    name: 'single steps of each vCPU are switched on, reported, and switched off',
    async run(bench) {
      const program = await bench.attach();
      for (let vcpu = 0; vcpu < VCPUS; vcpu++) {
        if ((await program.result(`watch-steps 0 ${1 << vcpu}`)) !== '0') {
          await bench.detach(program);
          await bench.allGoOn();
          return NO_TRAP_FLAG;
        }
        const { result, events } = await program.run('listen 10000');
        assert.equal(result, '0');
        assert.match(events[0] ?? '', new RegExp(`^event step slot=0 vcpu=${vcpu} `));
        assert.equal(await program.result('clear 0'), '0');
        await program.run('listen 0');
      }
      await bench.detach(program);
      await bench.allGoOn();
      return undefined;
    },
  },
  {
    name: 'single steps are counted down, and the callback runs at the last',
    async run(bench) {
      const program = await bench.attach();
      if ((await program.result('step 0 0 3')) !== '0') return NO_TRAP_FLAG;
      let events: readonly string[] = [];
      for (let steps = 0; steps < 6 && events.length === 0; steps++)
        ({ events } = await program.run('listen 10000'));
      assert.deepEqual(events, ['event steps-done slot=0']);
      await bench.detach(program);
      await bench.allGoOn();
      return undefined;
    },
  },
];
