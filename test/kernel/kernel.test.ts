import { describe, expect, it } from 'vitest';
import { discoverKernel } from '../../src/nt/kernel.js';
import { parseProfile } from '../../src/nt/profile.js';
import { FakeGuest, IMAGE_SIZE, profile, profileText } from './fake-guest.js';

const coded = (code: string) => expect.objectContaining({ name: 'MemtablesError', code });

describe('kernel discovery', () => {
  it('finds base, image, exports, symbols and the service table', () => {
    const guest = new FakeGuest();
    const kernel = discoverKernel(guest, profile);
    expect(kernel.base).toBe(guest.base);
    expect(kernel.image.sizeOfImage).toBe(IMAGE_SIZE);
    expect(kernel.exports.rvaOf('NtClose')).toBe(0x1100);
    expect(kernel.symbol('NtClose')).toBe(guest.symbol('NtClose'));
    expect(kernel.ssdt).toEqual({
      start: guest.symbol('KiServiceTable'),
      end: guest.symbol('KiServiceTable') + 4n * 0x1d0n,
    });
    expect(kernel.holes.size).toBe(0);
    expect(kernel.memory.pageTable).toBe(guest.kernelRoot);
  });

  it.each([0xffff_8000_0000_0000n, 0xffff_f800_0000_1000n, 0xffff_ffff_ffff_8000n])(
    'finds a kernel based at %s, whatever its alignment',
    (base) => {
      expect(discoverKernel(new FakeGuest({ base }), profile).base).toBe(base);
    },
  );

  it('passes by pages that are absent, and data that looks like a header', () => {
    const guest = new FakeGuest();
    const lstar = guest.base + 0x5800n;
    for (const registers of guest.vcpus) registers.lstar = lstar;
    guest.unmap(guest.base + 0x3000n);
    guest.write(guest.base + 0x5000n, Buffer.from('MZ'));
    guest.write(guest.base + 0x2000n, Buffer.from(new Uint8Array(0x1000).fill(0xff)));
    guest.write(guest.base + 0x2000n, Buffer.from('MZ'));
    // PsInitialSystemProcess lies where the fake header now is.
    guest.write64(guest.symbol('PsInitialSystemProcess'), guest.system);
    guest.write(guest.base + 0x4ff8n, Buffer.from('MZ'));
    expect(discoverKernel(guest, profile).base).toBe(guest.base);
  });

  it('does not take a smaller image below the entry for the kernel', () => {
    const guest = new FakeGuest();
    const header = Buffer.from(guest.readPhysical(guest.translate(guest.kernelRoot, guest.base)!, 0x400));
    header.writeUInt32LE(0x1000, 0x98 + 56);
    header.writeUInt16LE(0, 0x86);
    guest.write(guest.base + 0x2000n, header);
    for (const registers of guest.vcpus) registers.lstar = guest.base + 0x3080n;
    expect(discoverKernel(guest, profile).base).toBe(guest.base);
  });

  it('uses another vCPU when one runs user code under KVA shadow', () => {
    const guest = new FakeGuest({ vcpus: 2 });
    guest.enterUserMode(0);
    guest.vcpus[0]!.cr3 = guest.userRoot | 0x8000_0000_0000_0003n;
    expect(discoverKernel(guest, profile).base).toBe(guest.base);
  });

  it('asks to try again when every vCPU runs user code under KVA shadow', () => {
    const guest = new FakeGuest({ vcpus: 2 });
    for (const registers of guest.vcpus) registers.cr3 = guest.userRoot;
    expect(() => discoverKernel(guest, profile)).toThrow(
      expect.objectContaining({ code: 'KERNEL_NOT_FOUND', remedy: expect.stringContaining('Try again') }),
    );
  });

  it('passes by a vCPU that has not been started', () => {
    const guest = new FakeGuest({ vcpus: 2 });
    Object.assign(guest.vcpus[0]!, { efer: 0n, cr3: 0n, cr4: 0n, lstar: 0n });
    expect(discoverKernel(guest, profile).base).toBe(guest.base);
  });

  it.each([
    ['is not in long mode', { efer: 0x800n }],
    ['has no system call entry', { lstar: 0n }],
    ['has its system call entry in user space', { lstar: 0x7fff_0000_1000n }],
    ['uses 5-level paging', { cr4: 0x3506f8n | (1n << 12n) }],
  ])('refuses a guest that %s', (_, registers) => {
    const guest = new FakeGuest();
    Object.assign(guest.vcpus[0]!, registers);
    expect(() => discoverKernel(guest, profile)).toThrow(coded('GUEST_UNSUPPORTED'));
  });

  it('does not look further than an image can reach', () => {
    const guest = new FakeGuest();
    guest.vcpus[0]!.lstar = guest.base + 64n * 1024n * 1024n;
    expect(() => discoverKernel(guest, profile)).toThrow(coded('KERNEL_NOT_FOUND'));
  });

  it.each([
    ['GUID', 'FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF'],
    ['age', 2],
    ['database', 'ntkrpamp.pdb'],
  ] as const)('refuses a profile with another %s, and names both', (field, value) => {
    const other = parseProfile(
      profileText((isf) => Object.assign(isf.metadata.windows.pdb, { [field]: value })),
      'other',
    );
    expect(() => discoverKernel(new FakeGuest(), other)).toThrow(
      expect.objectContaining({
        code: 'PROFILE_MISMATCH',
        message: expect.stringMatching(
          /ntkrnlmp\.pdb 0123456789ABCDEF0123456789ABCDEF-1.*nt.*\.pdb [0-9A-F]{32}-\d/,
        ),
      }),
    );
  });

  it('refuses a kernel that names no PDB', () => {
    const guest = new FakeGuest();
    guest.write(guest.base + 0x4100n, Buffer.from('NB10'));
    expect(() => discoverKernel(guest, profile)).toThrow(coded('PROFILE_MISMATCH'));
  });

  it('tolerates pages that are discarded or paged out, and says which', () => {
    const guest = new FakeGuest();
    guest.unmap(guest.base + 0x3000n);
    guest.unmap(guest.base + 0x6000n);
    const kernel = discoverKernel(guest, profile);
    expect([...kernel.holes]).toEqual([0x3000, 0x6000]);
    expect(Buffer.from(kernel.image.read(0x3000, 4096)).equals(Buffer.alloc(4096))).toBe(true);
  });

  it.each([0x2000n, 0x4000n, 0x5000n])('refuses a kernel without the page at RVA %s', (rva) => {
    const guest = new FakeGuest();
    guest.unmap(guest.base + rva);
    expect(() => discoverKernel(guest, profile)).toThrow(
      expect.objectContaining({
        code: 'IMAGE_INVALID',
        message: expect.stringContaining('cannot read whole'),
      }),
    );
  });

  it('refuses a System process whose page table does not map the kernel', () => {
    const guest = new FakeGuest();
    guest.set(guest.system, '_KPROCESS', 'DirectoryTableBase', guest.userRoot);
    expect(() => discoverKernel(guest, profile)).toThrow(coded('GUEST_STRUCTURE_INVALID'));
  });

  it('refuses a System process in user space', () => {
    const guest = new FakeGuest();
    guest.write64(guest.symbol('PsInitialSystemProcess'), 0x7000n);
    expect(() => discoverKernel(guest, profile)).toThrow(coded('GUEST_STRUCTURE_INVALID'));
  });

  it.each([0, 0x1001, 0xffff_ffff])('refuses a service table with %s entries', (services) => {
    const guest = new FakeGuest();
    const limit = Buffer.alloc(4);
    limit.writeUInt32LE(services);
    guest.write(guest.symbol('KiServiceLimit'), limit);
    expect(() => discoverKernel(guest, profile)).toThrow(coded('GUEST_STRUCTURE_INVALID'));
  });

  it('refuses a symbol outside the image', () => {
    const wide = parseProfile(
      profileText((isf) => {
        isf.symbols.PsInitialSystemProcess = { address: IMAGE_SIZE };
      }),
      'test',
    );
    expect(() => discoverKernel(new FakeGuest(), wide)).toThrow(coded('PROFILE_INVALID'));
  });

  it('keeps the image as it was at discovery', () => {
    const guest = new FakeGuest();
    const kernel = discoverKernel(guest, profile);
    guest.write(guest.symbol('NtClose'), Buffer.from([0xe9]));
    expect(kernel.image.read(0x1100, 1)[0]).toBe(0);
    expect(kernel.memory.readU8(guest.symbol('NtClose'))).toBe(0xe9);
  });
});
