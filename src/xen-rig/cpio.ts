// Linux's initramfs: a cpio archive of the "newc" format. All files belong to root.
import { lstatSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';

const MAGIC = '070701';
const FOLDER = 0o040755;
const FILE = 0o100644;
const PROGRAM = 0o100755;
const LINK = 0o120777;
const TRAILER = 'TRAILER!!!';

/** The archive of everything below `folder`. */
export function cpioOf(folder: string): Buffer {
  const pieces: Buffer[] = [];
  let number = 0;
  const add = (name: string, mode: number, content: Buffer) => {
    const fields = [++number, mode, 0, 0, 1, 0, content.length, 0, 0, 0, 0, name.length + 1, 0];
    const header = MAGIC + fields.map((field) => field.toString(16).padStart(8, '0')).join('');
    pieces.push(padded(Buffer.from(`${header}${name}\0`)), padded(content));
  };
  const addBelow = (path: string, name: string) => {
    for (const entry of readdirSync(path).sort()) {
      const child = join(path, entry);
      const childName = join(name, entry);
      const stat = lstatSync(child);
      if (stat.isDirectory()) {
        add(childName, FOLDER, Buffer.alloc(0));
        addBelow(child, childName);
      } else if (stat.isSymbolicLink()) {
        add(childName, LINK, Buffer.from(readlinkSync(child)));
      } else {
        add(childName, (stat.mode & 0o100) === 0 ? FILE : PROGRAM, readFileSync(child));
      }
    }
  };
  addBelow(folder, '');
  add(TRAILER, 0, Buffer.alloc(0));
  return Buffer.concat(pieces);
}

function padded(bytes: Buffer): Buffer {
  return Buffer.concat([bytes], (bytes.length + 3) & ~3);
}
