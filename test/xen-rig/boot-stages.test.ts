import { expect, test } from 'vitest';
import { BootStages } from '../../src/xen-rig/boot-stages.js';

/** As the serial line has them, of a whole boot; shortened. */
const CONSOLE = [
  '\x1b[H\x1b[J\x1b[1;1Hloading xen',
  'loading dom0',
  '(XEN) Xen version 4.17.7 (Debian 4.17.7+13-g2445b30a44-0+deb12u1) (pkg-xen-devel@lists.alioth.debian.org)',
  '(XEN) Command line: placeholder console=com1',
  '(XEN)  - Extended Page Tables (EPT)',
  'about to get started...',
  '### init',
  '### xenstored',
  'Done setting up Dom0',
  '### node',
  '### node ended with 0',
];

test('each stage of a boot is told of once, in its order', () => {
  const stages = new BootStages();
  expect(CONSOLE.map((line) => stages.recognise(line)).filter((stage) => stage !== undefined)).toEqual([
    'GRUB loads Xen',
    'GRUB loads dom0',
    'Xen starts',
    "dom0's kernel starts",
    'dom0 has booted',
    'xenstored runs',
    'Node starts',
  ]);
  expect(CONSOLE.map((line) => stages.recognise(line))).toEqual(CONSOLE.map(() => undefined));
  expect(stages.facts).toEqual({ hypervisor: 'xen-4.17.7', ept: true });
});

test('a stage whose line got damaged holds up none of those behind it', () => {
  const stages = new BootStages();
  expect(stages.recognise('### in(XEN) d0v0 something')).toBeUndefined();
  expect(stages.recognise('### xenstored')).toBe('xenstored runs');
  expect(stages.recognise('### init')).toBeUndefined();
});

test('a Xen that does without EPT is not taken for one that has it', () => {
  const stages = new BootStages();
  for (const line of CONSOLE.filter((line) => !line.includes('EPT'))) stages.recognise(line);
  stages.recognise('Extended Page Tables (EPT)'); // not Xen's words
  expect(stages.facts.ept).toBe(false);
});
