import koffi from 'koffi';
import { MemtablesError } from '../errors.js';
import { type Gpa, gfnOf, hex, PAGE_SIZE, pageOffset } from '../vmi/address.js';

const READ_ONLY = 1; // PROT_READ
const FRAME_BYTES = 8;
const MOST_COPIES = 100;

/**
 * A domain's memory, mapped by Xen's own library: what it holds does not depend on the library that the tool is
 * attached through, nor does it need one.
 */
export class DomainMemory {
  readonly #handle: unknown;
  readonly #map: (...args: unknown[]) => unknown;
  readonly #unmap: (...args: unknown[]) => unknown;

  constructor(private readonly domain: number) {
    const library = koffi.load('libxenforeignmemory.so.1');
    const open = library.func('void *xenforeignmemory_open(void *logger, unsigned int flags)');
    this.#map = library.func(
      'void *xenforeignmemory_map(void *handle, uint32_t domain, int protection, size_t pages, const void *frames, void *errors)',
    );
    this.#unmap = library.func('int xenforeignmemory_unmap(void *handle, void *address, size_t pages)');
    this.#handle = open(null, 0);
    if (this.#handle === null) throw unreadable(this.domain, 'xenforeignmemory_open failed');
  }

  /**
   * The domain runs meanwhile: what is copied is what was there at one moment, unless that changes all the time.
   *
   * @throws MemtablesError `HYPERVISOR_FAILED` where the domain has no memory, or is gone
   */
  readPhysical(gpa: Gpa, length: number): Buffer {
    const pages = Math.ceil((pageOffset(gpa) + length) / PAGE_SIZE);
    const frames = Buffer.alloc(pages * FRAME_BYTES);
    for (let page = 0; page < pages; page++) {
      frames.writeBigUInt64LE(gfnOf(gpa) + BigInt(page), page * FRAME_BYTES);
    }
    const errors = Buffer.alloc(pages * Int32Array.BYTES_PER_ELEMENT);
    const address = this.#map(this.#handle, this.domain, READ_ONLY, pages, frames, errors);
    if (address === null) throw unreadable(this.domain, `nothing is mapped at ${hex(gpa)}`);
    try {
      if (errors.some((byte) => byte !== 0))
        throw unreadable(this.domain, `a page is missing at ${hex(gpa)}`);
      const mapped = Buffer.from(koffi.view(address, pages * PAGE_SIZE));
      return settledCopy(mapped.subarray(pageOffset(gpa), pageOffset(gpa) + length));
    } finally {
      this.#unmap(this.#handle, address, pages);
    }
  }
}

/** The copy after which nothing had changed. */
function settledCopy(memory: Buffer): Buffer {
  let copy = Buffer.from(memory);
  for (let copies = 1; !copy.equals(memory) && copies < MOST_COPIES; copies++) copy = Buffer.from(memory);
  return copy;
}

function unreadable(domain: number, why: string): MemtablesError {
  return new MemtablesError('HYPERVISOR_FAILED', `the memory of domain ${domain} cannot be read: ${why}`, {
    remedy: "Look at the rig's console log for why the domain ended.",
    context: { domain },
  });
}
