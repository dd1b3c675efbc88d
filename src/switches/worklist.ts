/** Addresses to look at: each once, the lowest first. */
export class Worklist {
  /** A binary heap. */
  private readonly heap: number[] = [];
  private readonly members = new Set<number>();

  add(address: number): void {
    if (this.members.has(address)) return;
    this.members.add(address);
    const { heap } = this;
    let at = heap.push(address) - 1;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (heap[parent]! <= address) break;
      heap[at] = heap[parent]!;
      at = parent;
    }
    heap[at] = address;
  }

  /** Takes the lowest address out. */
  take(): number | undefined {
    const { heap } = this;
    const lowest = heap[0];
    const last = heap.pop();
    if (lowest === undefined || last === undefined) return undefined;
    this.members.delete(lowest);
    if (heap.length > 0) this.sink(last);
    return lowest;
  }

  clear(): void {
    this.heap.length = 0;
    this.members.clear();
  }

  /** Puts `address` where the top of the heap was. */
  private sink(address: number): void {
    const { heap } = this;
    let at = 0;
    for (let child = 1; child < heap.length; child = 2 * at + 1) {
      if (child + 1 < heap.length && heap[child + 1]! < heap[child]!) child++;
      if (heap[child]! >= address) break;
      heap[at] = heap[child]!;
      at = child;
    }
    heap[at] = address;
  }
}
