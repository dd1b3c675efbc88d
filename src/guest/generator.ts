/** xorshift32: the guest's own generator, and the one that places it. Never 0, from a state that is not. */
export function nextRandom(state: number): number {
  let next = state;
  next ^= next << 13;
  next ^= next >>> 17;
  next ^= next << 5;
  return next >>> 0;
}
