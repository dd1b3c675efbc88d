import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { buffer } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import { MemtablesError } from '../../errors.js';
import type { Gva } from '../../vmi/address.js';
import type { SwitchFunction } from './switch-code.js';

const RUN_CODE = fileURLToPath(new URL('../../../build/Release/handlers-run-code', import.meta.url));
const HEADER_SIZE = 32;
const CYCLES_SIZE = 8;

/**
 * Runs each function once for each order, in every round, in a process of its own.
 *
 * @param orders the cases to go to, all of the same length
 * @returns the cycles of a run by round, order and function
 * @throws MemtablesError `BENCH_FAILED`; the reason of `signal`
 */
export async function runCode(
  image: Gva,
  functions: readonly SwitchFunction[],
  orders: readonly Uint32Array[],
  rounds: number,
  signal: AbortSignal,
): Promise<number[][][]> {
  const child = spawn(RUN_CODE, { stdio: ['pipe', 'pipe', 'inherit'], signal, killSignal: 'SIGKILL' });
  const ended = once(child, 'exit').catch((error: Error) => [error.message]);
  // One that ends early says so by its exit code.
  child.stdin.on('error', () => {});
  child.stdin.end(inputOf(image, functions, orders, rounds));
  const output = await buffer(child.stdout);
  const [ending] = await ended;
  signal.throwIfAborted();
  if (ending !== 0) {
    throw new MemtablesError('BENCH_FAILED', 'the generated code could not be run', {
      remedy:
        'See what it printed above; `npm run setup` builds it, and it needs memory that it may write and execute.',
      context: { program: RUN_CODE, ending },
    });
  }
  let at = 0;
  const next = () => Number(output.readBigUInt64LE(CYCLES_SIZE * at++));
  return Array.from({ length: rounds }, () => orders.map(() => functions.map(next)));
}

/** As `native/handlers/bench` reads it. */
function inputOf(
  image: Gva,
  functions: readonly SwitchFunction[],
  orders: readonly Uint32Array[],
  rounds: number,
): Buffer {
  const pieces = functions.flatMap((each) => each.pieces);
  const code = Buffer.alloc(Math.max(...pieces.map(({ offset, bytes }) => offset + bytes.length)));
  for (const { offset, bytes } of pieces) code.set(bytes, offset);
  const header = Buffer.alloc(HEADER_SIZE);
  header.writeBigUInt64LE(image);
  const counts = [code.length, functions.length, orders.length, orders[0]!.length, rounds];
  for (const [index, count] of counts.entries()) header.writeUInt32LE(count, 8 + 4 * index);
  const offsets = Uint32Array.from(functions, ({ offset }) => offset);
  const bytesOf = (array: Uint32Array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);
  return Buffer.concat([header, bytesOf(offsets), ...orders.map(bytesOf), code]);
}
