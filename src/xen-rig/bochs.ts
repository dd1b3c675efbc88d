import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { DebianRoot } from './debian-root.js';

/** Instructions a second, by which the emulated clock goes: about what Bochs does on one core, so that it goes right. */
const INSTRUCTIONS_PER_SECOND = 50_000_000;
const MEMORY_MB = 640;

/** The files that a run writes. */
export interface RunFiles {
  /** What Xen, dom0 and the guest print. */
  readonly console: string;
  /** What the program in dom0 reports. */
  readonly results: string;
  /** Bochs's own messages. */
  readonly log: string;
}

export function runFilesIn(folder: string): RunFiles {
  return {
    console: join(folder, 'console.log'),
    results: join(folder, 'results.jsonl'),
    log: join(folder, 'bochs.log'),
  };
}

/** A PC with VMX and EPT, emulated, that boots from a CD. */
export class Bochs {
  readonly ended: Promise<string>;
  readonly #process: ChildProcess;

  /** Empties the files of the run and starts. */
  constructor(debian: DebianRoot, iso: string, folder: string) {
    mkdirSync(folder, { recursive: true });
    const files = runFilesIn(folder);
    for (const file of Object.values(files)) writeFileSync(file, '');
    const configuration = join(folder, 'bochsrc');
    const debuggerScript = join(folder, 'debugger');
    writeFileSync(configuration, configurationOf(debian, iso, files));
    // Debian's Bochs begins in its debugger.
    writeFileSync(debuggerScript, 'continue\n');
    // However we end: an emulator that nobody waits for would take a processor for ever.
    const [command, ...first] = debian.command(debian.path('usr/bin/setpriv'));
    const bochs = debian.command(debian.path('usr/bin/bochs-bin'));
    const options = ['-q', '-f', configuration, '-rc', debuggerScript];
    const args = [...first, '--pdeathsig', 'KILL', ...bochs, ...options];
    this.#process = spawn(command, args, {
      stdio: 'ignore',
      // Ctrl-C is for us, and we end it.
      detached: true,
      env: {
        ...process.env,
        LTDL_LIBRARY_PATH: debian.path('usr/lib/x86_64-linux-gnu/bochs/plugins'),
        BXSHARE: debian.path('usr/share/bochs'),
        TERM: 'dumb',
      },
    });
    this.ended = new Promise((resolve) => {
      this.#process.once('error', (error) => resolve(error.message));
      // It exits with 1 also when the machine has switched itself off.
      this.#process.once('exit', (code, signal) => resolve(signal ?? `exit code ${code}`));
    });
  }

  /** Resolves when it is gone. */
  async kill(): Promise<void> {
    this.#process.kill('SIGKILL');
    await this.ended;
  }
}

function configurationOf(debian: DebianRoot, iso: string, files: RunFiles): string {
  return `megs: ${MEMORY_MB}
romimage: file=${debian.path('usr/share/bochs/BIOS-bochs-latest')}
vgaromimage: file=${debian.path('usr/share/vgabios/vgabios.bin')}
# With a graphics mode to choose GRUB would set one, and Xen dies before it prints anything.
vga: extension=none
cpu: model=corei7_skylake_x, count=1, ips=${INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0
clock: sync=none, time0=utc
pci: enabled=1, chipset=i440fx
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=${iso}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=${files.console}
com2: enabled=1, mode=file, dev=${files.results}
display_library: rfb, options="timeout=0"
log: ${files.log}
debugger_log: /dev/null
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
mouse: enabled=0
private_colormap: enabled=0
`;
}
