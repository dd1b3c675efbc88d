import { expect, test } from 'vitest';
import { Vacancy } from '../../src/memtables/vacancy.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { preemptAt } from './relocated-guest.js';

function guestAndKernel() {
  const guest = EmbeddedGuest.boot({ vcpus: 1, seed: 19 });
  const { kernel } = guest.attach({ threshold: 2 });
  guest.stopTimer();
  /** Spans that overlap, as those of two hot loads of one switch do. */
  const vacancyAround = (rip: bigint) =>
    new Vacancy(guest.hypervisor, kernel, [
      { start: rip - 16n, end: rip + 16n, owner: '' },
      { start: rip - 8n, end: rip + 24n, owner: '' },
    ]);
  return { guest, kernel, vacancyAround };
}

test('a vCPU is in the way at the first instruction too: it may be about to complete that', () => {
  const { guest, vacancyAround } = guestAndKernel();
  const { rip } = guest.machine.registers(0);
  const vacancy = vacancyAround(rip);
  expect(vacancy.isVacant(rip - 4n, 5)).toBe(false);
  expect(vacancy.isVacant(rip, 5)).toBe(false);
  expect(vacancy.isVacant(rip - 5n, 5)).toBe(true);
  expect(vacancy.isVacant(rip + 1n, 5)).toBe(true);
});

test('a preempted thread is not in the way at the first instruction, which it begins anew', () => {
  const { guest, kernel, vacancyAround } = guestAndKernel();
  const rip = preemptAt(guest, kernel, 0, (at) => (kernel.contains(at) ? at : undefined));
  const vacancy = vacancyAround(rip);
  expect(vacancy.isVacant(rip - 4n, 5)).toBe(false);
  expect(vacancy.isVacant(rip, 5)).toBe(true);
});

test('nothing is known of what was not looked at', () => {
  const { guest, vacancyAround } = guestAndKernel();
  const { rip } = guest.machine.registers(0);
  expect(vacancyAround(rip + 1000n).isVacant(rip + 900n, 5)).toBe(false);
  expect(vacancyAround(rip + 1000n).isVacant(rip + 1022n, 5)).toBe(false);
  expect(vacancyAround(rip + 1000n).isVacant(rip + 1000n, 5)).toBe(true);
});
