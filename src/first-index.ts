/** The index of the first of `items` that is `behind`, or their number: none that is may come before one that is not. */
export function firstIndex<Item>(items: readonly Item[], behind: (item: Item) => boolean): number {
  let low = 0;
  let high = items.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (behind(items[middle]!)) high = middle;
    else low = middle + 1;
  }
  return low;
}
