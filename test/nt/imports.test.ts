import { describe, expect, it } from 'vitest';
import { importedFiles } from '../../src/nt/imports.js';
import { PeImage } from '../../src/nt/pe.js';
import { buildPe, FLAGS } from './pe-builder.js';

const RVA = 0x1000;
const NAMES = 0x1800;
const invalid = expect.objectContaining({ code: 'IMAGE_INVALID' });

/** An image that imports from files with these names, which `change` may alter first. */
function imageWith(files: readonly string[], change: (section: Buffer) => void = () => {}): PeImage {
  const bytes = Buffer.alloc(0x4000);
  files.forEach((file, index) => {
    bytes.writeUInt32LE(NAMES + index * 0x20, index * 20 + 12);
    bytes.write(`${file}\0`, NAMES - RVA + index * 0x20, 'latin1');
  });
  change(bytes);
  const sections = [{ name: '.rdata', rva: RVA, flags: FLAGS.data, bytes }];
  return PeImage.fromFile(buildPe({ sections, directories: { 1: { rva: RVA, size: 0x100 } } }));
}

describe('the files that an image imports from', () => {
  it('are named in the order of its table', () => {
    expect(importedFiles(imageWith(['HAL.dll', 'CI.dll']))).toEqual(['HAL.dll', 'CI.dll']);
    expect(importedFiles(imageWith([]))).toEqual([]);
  });

  it('are none without a table', () => {
    const sections = [{ name: '.text', rva: RVA, flags: FLAGS.code, bytes: Buffer.alloc(16) }];
    expect(importedFiles(PeImage.fromFile(buildPe({ sections })))).toEqual([]);
  });

  it.each([
    ['its end is missing', (bytes: Buffer) => bytes.fill(0x11, 0, 0x800)],
    ['every entry up to the end of the image names a file', (bytes: Buffer) => fillNames(bytes)],
    ['a name lies outside the image', (bytes: Buffer) => bytes.writeUInt32LE(0x7fff_ffff, 12)],
    ['a name does not end', (bytes: Buffer) => bytes.fill(0x41, NAMES - RVA)],
  ])('are refused where %s', (_, change) => {
    expect(() => importedFiles(imageWith(['a.dll'], change))).toThrow(invalid);
  });
});

function fillNames(bytes: Buffer): void {
  for (let at = 12; at + 4 <= bytes.length; at += 20) bytes.writeUInt32LE(NAMES + 0x3000 - 2, at);
}
