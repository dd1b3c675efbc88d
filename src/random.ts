/** xorshift32, which the guest's workload uses too. Never 0, from a state that is not. */
export function nextRandom(state: number): number {
  let next = state;
  next ^= next << 13;
  next ^= next >>> 17;
  next ^= next << 5;
  return next >>> 0;
}
