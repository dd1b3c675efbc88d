#!/usr/bin/env node
import { readFileSync } from 'node:fs';
import { Command, InvalidArgumentError, Option } from 'commander';
import {
  DEFAULT_STUCK_AFTER_SECONDS,
  DEFAULT_THRESHOLD,
  DEFAULT_UNLOAD_SECONDS,
} from '../attachment/attachment.js';
import { HOOK_NAME, HOOK_NAME_FORMS } from '../memtables/hook-name.js';
import { EXIT_CODE_HELP } from './exit-codes.js';
import { handler, integer, json, library, seconds, seed } from './options.js';
import { Output } from './output.js';
import { exitAsDocumented, run } from './run.js';

function hooks(name: string, previous: readonly string[] = []): string[] {
  if (!HOOK_NAME.test(name)) throw new InvalidArgumentError(HOOK_NAME_FORMS);
  if (previous.includes(name)) throw new InvalidArgumentError('Name each function once.');
  return [...previous, name];
}

function version(): string {
  return JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')).version;
}

const vcpus = () =>
  new Option('--vcpus <n>', 'virtual CPUs of the embedded guest').argParser(integer(1, 8)).default(2);
const hook = (note: string) =>
  new Option(
    '--hook <nt!Name>',
    `kernel function to hook, also module!Name or module+0xRVA; may be given several times (${note})`,
  ).argParser(hooks);

const program = new Command('memtables')
  .description(
    'Hides kernel hooks in a live Windows VM and keeps it fast: hot switch-table loads are moved off the ' +
      'read-trapped pages into handlers that load immediates. Start with: memtables demo',
  )
  .version(version(), '--version')
  .showHelpAfterError('(see --help)')
  .exitOverride(exitAsDocumented)
  .addHelpText('afterAll', EXIT_CODE_HELP);

program
  .command('demo')
  .description(
    'Start an embedded host with an NT-like guest, attach, measure three phases (no hooks; hooks; hooks with ' +
      'relocation), unload, and prove that the guest is as it was.',
  )
  .addOption(vcpus())
  .addOption(new Option('--seconds <n>', 'length of each phase').argParser(seconds).default(3))
  .addOption(seed())
  .addOption(hook('default: those that trap most tables'))
  .addOption(handler())
  .addOption(library())
  .addOption(json())
  .addHelpText(
    'after',
    `
Examples:
  memtables demo                                 two vCPUs, three seconds a phase, another guest each time
  memtables demo --seed 7 --vcpus 4 --seconds 5  the same guest each time
  memtables demo --hook nt!NtCreateFile          hooks of your own; which pages they trap decides what gets slow
  memtables demo --json | tail -1                the figures`,
  )
  .action((options) =>
    run(async () => {
      const { demoCommand } = await import('./demo.js');
      await demoCommand(options, new Output(options.json ?? false));
    }),
  );

program
  .command('host')
  .description(
    'Run the embedded host: a hypervisor with an NT-like guest that connects to an introspection tool over KVMI, ' +
      'as QEMU does. Ends on Ctrl-C.',
  )
  .requiredOption('--socket <path>', 'unix socket of the introspection tool; retried until it exists')
  .addOption(vcpus())
  .addOption(new Option('--memory <mb>', "the guest's memory").argParser(integer(32, 4096)).default(64))
  .addOption(seed())
  .option('--statistics <path>', 'unix socket of the statistics channel (default: SOCKET.stats)')
  .option('--no-module', 'a guest that runs its kernel only, and no real code in a module')
  .addHelpText(
    'after',
    `
Example, in two terminals:
  memtables host --socket /tmp/kvmi
  memtables attach -n embedded -s /tmp/kvmi -j build/guest/ntoskrnl.json --hook nt!ExAllocatePoolWithTag -t 10

docs/host-statistics.md says what the statistics channel answers.`,
  )
  .action((options) =>
    run(async () => {
      const { hostCommand } = await import('./host.js');
      await hostCommand(options);
    }),
  );

program
  .command('attach')
  .description(
    'Attach to a running VM, hide the given hooks, and relocate the table loads they make expensive. Ends, with ' +
      'everything undone, on Ctrl-C or after -t seconds.',
  )
  .requiredOption(
    '-n, --name <name>',
    'the VM, as libvmi or `xl list` names it; the bundled library for KVM does not look at it, and attaches to whoever ' +
      'connects',
  )
  .option('-s, --socket <path>', 'for a VM on KVM: unix socket that the hypervisor connects to')
  .option('--xen', 'for a VM on Xen, in whose dom0 this runs as root')
  .requiredOption('-j, --profile <file>', "ISF profile of the guest's kernel (JSON)")
  .addOption(hook('at least one'))
  .addOption(
    new Option('-t, --time <seconds>', 'unload after this long (default: on Ctrl-C)').argParser(seconds),
  )
  .addOption(
    new Option('--threshold <n>', 'relocate a table load after more than this many trapped reads')
      .argParser(integer(1, 1_000_000))
      .default(DEFAULT_THRESHOLD),
  )
  .addOption(handler())
  .option(
    '--ahead',
    'relocate every switch whose table the hooks put on a trapped page, before it has trapped; the pages, also those ' +
      'that this traps in turn, are planned from the kernel image first',
  )
  .option('--no-relocate', 'hide the hooks but leave the table loads where they are')
  .addOption(
    new Option('--unload-timeout <seconds>', 'how long to wait for threads to leave the handlers')
      .argParser(seconds)
      .default(DEFAULT_UNLOAD_SECONDS),
  )
  .addOption(
    new Option(
      '--stuck-after <seconds>',
      'how long a call of the hypervisor may take (the bundled library gives up after 10 by itself)',
    )
      .argParser(seconds)
      .default(DEFAULT_STUCK_AFTER_SECONDS),
  )
  .option(
    '--journal <file>',
    'where changes to the guest are recorded while they last (default: SOCKET.journal, on Xen NAME.journal)',
  )
  .addOption(library())
  .addOption(json())
  .addHelpText(
    'after',
    `
Example:
  memtables attach -n my-vm -s /run/introspection.sock -j ntkrnlmp.json --hook nt!ExAllocatePoolWithTag

On KVM the hypervisor has to connect to the socket within ten seconds. Ctrl-C unloads; a second Ctrl-C ends at once and may
leave changes in the guest. The journal is removed by a clean unload; one that stays lists what is left.
MEMTABLES_LOG=warn prints less.`,
  )
  .action((options) =>
    run(async () => {
      const { attachCommand } = await import('./attach.js');
      await attachCommand(options, new Output(options.json ?? false));
    }),
  );

program
  .command('scan')
  .description('List the switch-table loads of PE64 files on disk, and which of them could be relocated.')
  .argument('<files...>', 'x86-64 Windows executables, libraries or drivers')
  .addOption(json())
  .addHelpText('after', '\nExample:\n  memtables scan ntoskrnl.exe')
  .action((files, options) =>
    run(async () => {
      const { scanFiles } = await import('./scan.js');
      process.exitCode = scanFiles(files, options, process.stdout);
    }),
  );

await program.parseAsync();
