import koffi from 'koffi';

/** Memory that C can keep a pointer to: it stays where it is for as long as this object is reachable. */
export class NativeBlock {
  readonly view: DataView;
  readonly bytes: Uint8Array;
  readonly address: bigint;

  constructor(size: number) {
    // An ArrayBuffer of its own: a small typed array may lie on the JavaScript heap, and move.
    const memory = new ArrayBuffer(size);
    this.view = new DataView(memory);
    this.bytes = new Uint8Array(memory);
    this.address = koffi.address(this.bytes);
  }

  u32(offset: number): number {
    return this.view.getUint32(offset, true);
  }

  u64(offset: number): bigint {
    return this.view.getBigUint64(offset, true);
  }

  setU32(offset: number, value: number): void {
    this.view.setUint32(offset, value, true);
  }

  setU64(offset: number, value: bigint): void {
    this.view.setBigUint64(offset, value, true);
  }
}
