import { describe, expect, it, vi } from 'vitest';
import { discoverKernel } from '../../src/nt/kernel.js';
import { KernelImage } from '../../src/nt/kernel-image.js';
import { KernelImages } from '../../src/nt/kernel-images.js';
import { PeImage } from '../../src/nt/pe.js';
import { buildPe, FLAGS } from '../nt/pe-builder.js';
import { FakeGuest, profile } from './fake-guest.js';

const DRIVER = 0xffff_f804_3000_0000n;

/** A driver as the loader maps it: code, code that is paged out, data. */
function driver(fill = 0xc3): Buffer {
  const section = (name: string, rva: number, flags: number) => ({
    name,
    rva,
    flags,
    bytes: Buffer.alloc(0x800, fill),
  });
  const file = PeImage.fromFile(
    buildPe({
      sections: [
        section('.text', 0x1000, FLAGS.code),
        section('PAGE', 0x2000, FLAGS.code),
        section('.data', 0x3000, FLAGS.writableData),
      ],
    }),
  );
  return Buffer.from(file.read(0, file.sizeOfImage));
}

function guestWithDriver() {
  const guest = new FakeGuest();
  guest.addModule('ntoskrnl.exe', guest.base, 0x7000);
  const entry = guest.loadModule('Driver.sys', DRIVER, driver());
  const images = () => {
    const kernel = discoverKernel(guest, profile);
    return new KernelImages(kernel, (gva, length) => kernel.memory.readIfMapped(gva, length));
  };
  return { guest, entry, images };
}

/** Gives NT an import table. */
function importInto(guest: FakeGuest, files: readonly string[]): void {
  const table = Buffer.alloc((files.length + 1) * 20);
  files.forEach((file, index) => {
    const name = 0x4500 + index * 0x20;
    table.writeUInt32LE(name, index * 20 + 12);
    guest.write(guest.base + BigInt(name), Buffer.from(`${file}\0`, 'latin1'));
  });
  guest.write(guest.base + 0x4400n, table);
  const directory = Buffer.alloc(8);
  directory.writeUInt32LE(0x4400, 0);
  directory.writeUInt32LE(table.length, 4);
  guest.write(guest.base + 0x98n + 112n + 8n, directory);
}

describe('the images of the kernel', () => {
  it('are found by any address inside them, and none beside them', () => {
    const { guest, images } = guestWithDriver();
    const all = images();
    expect(all.moduleCount).toBe(1);
    expect(all.at(guest.base)).toBe(all.nt);
    const image = all.at(DRIVER + 0x3fffn) as KernelImage;
    expect([image.name, image.base, image.end]).toEqual(['Driver.sys', DRIVER, DRIVER + 0x4000n]);
    expect(all.at(DRIVER)).toBe(image);
    expect(all.rangeAt(DRIVER)).toEqual({ start: DRIVER, end: DRIVER + 0x4000n });
    for (const outside of [0n, guest.base - 1n, DRIVER - 1n, DRIVER + 0x4000n]) {
      expect([all.at(outside), all.rangeAt(outside)]).toEqual([undefined, undefined]);
    }
  });

  it('are found by their file name, in any case, with its extension or without', () => {
    const { images } = guestWithDriver();
    const all = images();
    expect(all.named('NT')).toBe(all.nt);
    for (const name of ['driver.sys', 'DRIVER']) expect(all.named(name)).toBe(all.at(DRIVER));
    for (const name of ['', 'driver.', 'sys', 'ntoskrnl']) expect(all.named(name)).toBeUndefined();
  });

  it('are those at the first look: what is changed later is not in them', () => {
    const { guest, images } = guestWithDriver();
    const all = images();
    const image = all.at(DRIVER) as KernelImage;
    guest.write(DRIVER + 0x1000n, Buffer.from([0xe9]));
    expect(image.image.read(0x1000, 1)[0]).toBe(0xc3);
    expect(all.at(DRIVER)).toBe(image);
  });

  it('may lack what Windows pages out, and nothing else', () => {
    const paged = guestWithDriver();
    paged.guest.unmap(DRIVER + 0x2000n);
    expect([...(paged.images().at(DRIVER) as KernelImage).holes]).toEqual([0x2000]);
    const damaged = guestWithDriver();
    damaged.guest.unmap(DRIVER + 0x1000n);
    expect(damaged.images().at(DRIVER)).toBe('unreadable');
  });

  it.each([
    ['of a session, which the System process does not have mapped', () => {}, true],
    ['that is no image', (image: Buffer) => image.write('ZM'), false],
    ['for another processor', (image: Buffer) => image.writeUInt16LE(0x14c, 0x84), false],
    [
      'whose header says that it is larger than the list does',
      (image: Buffer) => image.writeUInt32LE(0x5000, 0x98 + 56),
      false,
    ],
    [
      'with functions outside of it',
      (image: Buffer) => {
        image.writeUInt32LE(0x3000, 0x98 + 112 + 3 * 8);
        image.writeUInt32LE(12, 0x98 + 116 + 3 * 8);
        image.fill(0xff, 0x3000, 0x300c);
      },
      false,
    ],
  ])('cannot be worked with: one %s', (_, spoil, isUnmapped) => {
    const guest = new FakeGuest();
    const image = driver();
    spoil(image);
    if (isUnmapped) guest.addModule('a.sys', DRIVER, 0x4000);
    else guest.loadModule('a.sys', DRIVER, image);
    const kernel = discoverKernel(guest, profile);
    const all = new KernelImages(kernel, (gva, length) => kernel.memory.readIfMapped(gva, length));
    expect([all.at(DRIVER), all.named('a')]).toEqual(['unreadable', 'unreadable']);
  });

  it('that overlap NT or one another are not all listed', () => {
    const { guest, images } = guestWithDriver();
    guest.addModule('over-nt.sys', guest.base + 0x1000n, 0x1000);
    guest.addModule('over-driver.sys', DRIVER + 0x1000n, 0x9000);
    guest.addModule('behind.sys', DRIVER + 0x4000n, 0x1000);
    const all = images();
    expect(all.moduleCount).toBe(2);
    expect(all.at(guest.base + 0x1000n)).toBe(all.nt);
    expect(all.named('over-driver')).toBeUndefined();
  });

  it('are never unloaded if NT itself imports from them', () => {
    const { guest, images } = guestWithDriver();
    guest.loadModule('ci.dll', DRIVER + 0x10_0000n, driver());
    const names = () =>
      images()
        .permanent()
        .map(({ name }) => name);
    expect(names()).toEqual(['nt']);
    importInto(guest, ['gone.dll', 'CI.dll']);
    expect(names()).toEqual(['nt', 'ci.dll']);
    // What Windows has discarded may be anything.
    guest.write(guest.base + 0x4400n, Buffer.alloc(0x100, 0xff));
    expect(names()).toEqual(['nt']);
  });

  it('are read up to 256 MB in all: a hostile list must not fill our memory', () => {
    const guest = new FakeGuest();
    const size = 60 << 20;
    const image = driver();
    image.writeUInt32LE(size, 0x98 + 56);
    const bases = [0n, 1n, 2n, 3n, 4n].map((index) => DRIVER + index * 0x1000_0000n);
    for (const base of bases) guest.removeModule(guest.loadModule('a.sys', base, image));
    for (const base of bases) guest.addModule('a.sys', base, size);
    const kernel = discoverKernel(guest, profile);
    const all = new KernelImages(kernel, (gva, length) => kernel.memory.readIfMapped(gva, length));
    expect(bases.map((base) => all.at(base) === 'unreadable')).toEqual([false, false, false, false, true]);
  });
});

describe('the list of modules is read again', () => {
  it('when it is doubted, but not sooner than a second after the last time', () => {
    const { images } = guestWithDriver();
    const now = vi.spyOn(performance, 'now').mockReturnValue(1000);
    try {
      const all = images();
      now.mockReturnValue(5000);
      expect(all.isRefreshDue).toBe(false);
      all.doubtList();
      expect(all.isRefreshDue).toBe(true);
      all.refresh();
      all.doubtList();
      expect(all.isRefreshDue).toBe(false);
      now.mockReturnValue(6000);
      expect(all.isRefreshDue).toBe(true);
    } finally {
      now.mockRestore();
    }
  });

  it('and what is new in it is found, what is gone no longer, and what has stayed is the same', () => {
    const { guest, entry, images } = guestWithDriver();
    const all = images();
    const image = all.at(DRIVER);
    const other = guest.loadModule('other.sys', DRIVER + 0x10_0000n, driver());
    all.refresh();
    expect(all.at(DRIVER)).toBe(image);
    expect(all.named('other')).toBeInstanceOf(KernelImage);
    guest.removeModule(entry);
    guest.removeModule(other);
    all.refresh();
    expect([all.at(DRIVER), all.moduleCount]).toEqual([undefined, 0]);
  });

  it('and an image is read anew where another one of the same name and size lies now', () => {
    const { guest, images } = guestWithDriver();
    const all = images();
    const image = all.at(DRIVER) as KernelImage;
    expect(all.isCurrent(image)).toBe(true);
    const another = driver(0x90);
    another.writeUInt32LE(0x1234, 0x88); // its time stamp
    guest.write(DRIVER, another);
    expect(all.isCurrent(image)).toBe(false);
    all.refresh();
    expect((all.at(DRIVER) as KernelImage).image.read(0x1000, 1)[0]).toBe(0x90);
    guest.unmap(DRIVER);
    expect(all.isCurrent(all.at(DRIVER) as KernelImage)).toBe(false);
  });

  it('and while it is being changed what was known stays', () => {
    const { guest, entry, images } = guestWithDriver();
    const all = images();
    guest.write64(entry, 0x41414141n);
    all.refresh();
    expect(all.named('driver')).toBeInstanceOf(KernelImage);
  });
});
