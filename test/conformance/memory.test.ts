import { describe, expect, it } from 'vitest';
import { Id, type Message, PAGE } from '../kvmi/peer.js';
import { LIBRARIES } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';
import { FRAMES, pattern } from './guest-memory.js';

function ranges(messages: readonly Message[]): [number, number][] {
  return messages.map(({ body }) => [Number(body.readBigUInt64LE(0)), Number(body.readBigUInt64LE(8))]);
}

describe.each(LIBRARIES)('physical memory with $library', ({ path }) => {
  const { start } = programsOn(path);

  it('is read in whole pages, whatever piece is wanted', async () => {
    const memory = pattern();
    const { program, peer } = await start({ memory });
    expect(await program.result('read 0x2ffe 5')).toBe(`0 5 ${memory.toString('hex', 0x2ffe, 0x3003)}`);
    expect(ranges(peer.all(Id.readPhysical))).toEqual([
      [0x2000, PAGE],
      [0x3000, PAGE],
    ]);
  });

  it('is written page by page, with exactly the bytes', async () => {
    const { program, peer } = await start();
    expect(await program.result('write 0x4ffd aabbccddee')).toBe('0 5');
    expect(peer.all(Id.writePhysical).map((m) => m.body.toString('hex'))).toEqual([
      'fd4f0000000000000300000000000000aabbcc',
      '00500000000000000200000000000000ddee',
    ]);
    expect(await program.result('read 0x4ffc 7')).toBe('0 7 00aabbccddee00');
  });

  it('ends where the hypervisor says, and the bytes before the end are counted', async () => {
    const { program } = await start({ memory: pattern() });
    const end = FRAMES * PAGE;
    expect(await program.result(`read ${end - 2} 4`)).toMatch(/^1 2 /);
    expect(await program.result(`read ${end} 1`)).toBe('1 0 ');
    expect(await program.result('read 0xfffffffffffff000 4096')).toBe('1 0 ');
    expect(await program.result('read 0xffffffffffffffff 2')).toBe('1 0 ');
    expect(await program.result(`write ${end - 2} 01020304`)).toBe('1 2');
    expect(await program.result(`write ${end} 01`)).toBe('1 0');
  });

  it('reaches up to a frame that was trapped beyond its end', async () => {
    const { program, peer } = await start();
    await program.run('watch-all 0 6');
    const end = FRAMES * PAGE;
    expect(await program.result(`trap ${FRAMES + 2} 6`)).toBe('0');
    peer.answers.set(Id.readPhysical, () => Buffer.alloc(PAGE, 0x77));
    expect(await program.result(`read ${end + PAGE} 1`)).toBe('0 1 77');
    expect(await program.result(`read ${end + 2 * PAGE} 1`)).toBe('1 0 ');
    // Asked for anew, it is what the hypervisor says.
    expect(await program.result('size')).toBe(`2 0x${end.toString(16)} 0x${end.toString(16)}`);
    expect(await program.result(`read ${end} 1`)).toBe('1 0 ');
  });

  it('of no bytes is no transfer', async () => {
    const { program, peer } = await start();
    expect(await program.result('read 0 0')).toBe('0 0 ');
    expect(await program.result('write 0 -')).toBe('0 0');
    expect(peer.all(Id.readPhysical)).toEqual([]);
    expect(peer.all(Id.writePhysical)).toEqual([]);
  });

  it('that the hypervisor refuses is a failure, and the session goes on', async () => {
    const { program, peer } = await start({ memory: pattern() });
    peer.answers.set(Id.readPhysical, () => -14);
    peer.answers.set(Id.writePhysical, () => -14);
    expect(await program.result('read 0x1000 4')).toBe('1 0 ');
    expect(await program.result('write 0x1000 01')).toBe('1 0');
    peer.answers.clear();
    await program.run('flush');
    expect(await program.result('read 0x1000 4')).toMatch(/^0 4 /);
  });

  it('whose size is refused is told as nothing', async () => {
    const { program, peer } = await start();
    peer.answers.set(Id.getMaxGfn, () => -22);
    expect(await program.result('size')).toBe('2 0x0 0x0');
  });
});
