// Compares the layouts and constants that this project was written with, with those of libvmi's headers: installed
// ones, or those that --include names. Says each expression that differs, ours and theirs.
import { spawnSync } from 'node:child_process';
import { parseArgs } from 'node:util';
import { checkAbi, hasHeaders } from '../dist/libvmi/abi-check.js';

const USAGE = `usage: npm run check:abi -- [--include DIR]
  --include DIR  the folder that holds libvmi/libvmi.h; else where pkg-config and the compiler find it`;

class UsageError extends Error {}

function say(message) {
  process.stderr.write(`check:abi: ${message}\n`);
}

/** Where an installed libvmi has its headers, if it says so. */
function installedFlags() {
  const { status, stdout } = spawnSync('pkg-config', ['--cflags', 'libvmi'], { encoding: 'utf8' });
  return status === 0 ? stdout.split(/\s+/).filter(Boolean) : [];
}

function main() {
  const options = { include: { type: 'string' }, help: { type: 'boolean' } };
  const { include, help } = parseArgs({ options }).values;
  if (help) {
    process.stdout.write(`${USAGE}\n`);
    return;
  }
  const flags = include === undefined ? installedFlags() : ['-I', include];
  if (!hasHeaders(flags)) {
    if (include !== undefined) throw new UsageError(`there is no libvmi/libvmi.h in ${include}`);
    say(
      "SKIPPED: libvmi's headers are not installed (--include DIR names the folder that holds libvmi/libvmi.h)",
    );
    return;
  }
  const { compared, differences } = checkAbi(flags);
  for (const { expression, ours, theirs } of differences) {
    say(`${expression}: ours ${ours}, theirs ${theirs ?? 'unknown'}`);
  }
  say(`${compared} sizes, offsets and constants compared, ${differences.length} differ`);
  if (differences.length > 0) process.exitCode = 1;
}

try {
  main();
} catch (error) {
  const isUsage = error instanceof UsageError || error.code?.startsWith('ERR_PARSE_ARGS');
  say(`error: ${error.message}${isUsage ? `\n${USAGE}` : ''}`);
  process.exitCode = isUsage ? 2 : 1;
}
