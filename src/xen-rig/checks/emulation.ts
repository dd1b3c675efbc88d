import { strict as assert } from 'node:assert';
import {
  originalBytes,
  READ_1,
  READ_2,
  READ_4,
  READ_8,
  type RESULT,
  resultOf,
  VCPUS,
  type WatchedPage,
} from '../watched-guest.js';
import { ACCESS, answer, answerUntil, type Bench, type Check, RESPOND, watch } from './bench.js';

const DATA = Buffer.from('d1d2d3d4d5d6d7d8', 'hex');

const WIDTHS: readonly [width: number, page: WatchedPage, seen: keyof typeof RESULT, index: number][] = [
  [8, READ_8, 'seen8', 0],
  [4, READ_4, 'seen4', 1],
  [2, READ_2, 'seen2', 2],
  [1, READ_1, 'seen1', 3],
];

function seenBy(bench: Bench, vcpu: number, seen: keyof typeof RESULT, width: number): string {
  return bench.read(resultOf(vcpu, seen), width).toString('hex');
}

export const EMULATION: readonly Check[] = [
  ...(['emulate', 'emulate-allocated'] as const).flatMap((action) =>
    WIDTHS.map(
      ([width, page, seen, index]): Check => ({
        name: `data is read instead of memory, which stays as it is: ${width} bytes by ${action}`,
        async run(bench) {
          const program = await bench.attach();
          await program.run(`actions ${action} ${DATA.toString('hex')}`);
          await watch(program, 0, page, ACCESS.readWrite);
          const data = DATA.toString('hex', 0, width);
          for (let vcpu = 0; vcpu < VCPUS; vcpu++)
            await answerUntil(program, () => seenBy(bench, vcpu, seen, width) === data);
          const original = originalBytes(index).toString('hex', 0x10, 0x10 + width);
          assert.equal(bench.read(page.gpa, width).toString('hex'), original);
          await bench.detach(program);
          await bench.allGoOn();
          assert.equal(seenBy(bench, 0, seen, width), original);
        },
      }),
    ),
  ),
  {
    name: 'the data of one answer does not show in the next',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions emulate ${DATA.toString('hex')}`);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await answer(program, 2 * VCPUS);
      await program.run(`actions respond ${RESPOND.emulate}`);
      const original = originalBytes(0).toString('hex', 0x10, 0x18);
      for (let vcpu = 0; vcpu < VCPUS; vcpu++)
        await answerUntil(program, () => seenBy(bench, vcpu, 'seen8', 8) === original);
    },
  },
  {
    name: 'data of fewer bytes than are read is followed by zeros',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`actions emulate ${DATA.toString('hex', 0, 3)}`);
      await watch(program, 0, READ_8, ACCESS.readWrite);
      await answerUntil(program, () => seenBy(bench, 0, 'seen8', 8) === 'd1d2d30000000000');
    },
  },
];
