import { hex } from '../vmi/address.js';

/** JSON with addresses (`bigint`) as `"0x…"` strings, on one line. */
export function toJson(value: unknown): string {
  return JSON.stringify(value, (_key, item) => {
    if (typeof item === 'bigint') return hex(item);
    if (item instanceof Uint8Array) return Buffer.from(item).toString('hex');
    return item;
  });
}
