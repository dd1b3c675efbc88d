import { afterEach, expect } from 'vitest';
import type { PeerOptions } from '../kvmi/peer.js';
import { type Attached, attach, Program } from '../kvmi/program.js';

interface Programs {
  /** A program that has loaded the library and not attached yet. */
  load(): Program;
  /** A program that is attached to a scripted peer. */
  start(options?: PeerOptions): Promise<Attached>;
}

/** Programs that use one library; each has to end in order when its test is over. */
export function programsOn(library: string): Programs {
  const programs: Program[] = [];
  afterEach(async () => {
    const ends = await Promise.all(programs.splice(0).map((program) => program.end()));
    expect(ends.filter((end) => end !== 0 && end !== 'SIGKILL')).toEqual([]);
  });
  return {
    load() {
      const program = new Program(library);
      programs.push(program);
      return program;
    },
    async start(options) {
      const attached = await attach(library, options);
      programs.push(attached.program);
      return attached;
    },
  };
}
