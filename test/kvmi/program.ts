import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { AbiProgram } from '../../src/xen-rig/abi-program.js';
import { type PeerOptions, ScriptedPeer } from './peer.js';

const PROGRAM = 'build/Release/abi-check';
export const BUNDLED = 'build/Release/kvmi.so';

const INIT_DOMAINNAME = 1;
const INIT_EVENTS = 4;
const KVM = 1;

/** A C program that uses a library over a socket of its own. */
export class Program extends AbiProgram {
  private readonly directory = mkdtempSync(join(tmpdir(), 'kvmi-'));
  readonly socketPath = join(this.directory, 'socket');

  constructor(library: string) {
    if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing: run npm run setup`);
    super(PROGRAM, library);
  }

  init(flags = INIT_DOMAINNAME | INIT_EVENTS, path = this.socketPath, mode = KVM): Promise<string> {
    return this.result(`init ${path} ${flags} ${mode}`);
  }

  override async end(): Promise<number | string> {
    const ended = await super.end();
    rmSync(this.directory, { recursive: true, force: true });
    return ended;
  }
}

export interface Attached {
  readonly program: Program;
  readonly peer: ScriptedPeer;
}

/** A program that has attached to a scripted peer. */
export async function attach(library: string, options: PeerOptions = {}): Promise<Attached> {
  const program = new Program(library);
  const [status, peer] = await Promise.all([
    program.init(),
    ScriptedPeer.connect(program.socketPath, options),
  ]);
  if (status !== '0 error=0') throw new Error(`attach: ${status}: ${program.stderr}`);
  return { program, peer };
}
