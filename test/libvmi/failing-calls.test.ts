import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ACCESS_NONE, FUNCTION_NAMES, type FunctionName } from '../../src/libvmi/abi.js';
import { openSession } from '../../src/libvmi/open-session.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { codeOf } from '../support/code-of.js';

const SUCCESS: Partial<Record<FunctionName, string>> = {
  vmi_events_version: '9',
  vmi_init: '(*instance = instance, 0)',
  vmi_init_paging: '4',
  vmi_get_num_vcpus: '2',
  vmi_get_max_physical_address: '0x100000',
};

let directory: string;

beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), 'memtables-failing-'));
});

afterAll(() => rmSync(directory, { recursive: true }));

/** A library of which every call succeeds at once and does nothing, but for one that returns `result`. */
function libraryThatFails(failing: FunctionName, result: string): string {
  const path = join(directory, `${failing}.so`);
  const functions = FUNCTION_NAMES.map((name) => {
    const value = name === failing ? result : (SUCCESS[name] ?? '0');
    const parameters = 'void **instance, unsigned long second, unsigned char third';
    return `unsigned long ${name}(${parameters}) { (void)instance, (void)second, (void)third; return ${value}; }`;
  });
  execFileSync('cc', ['-shared', '-fPIC', '-x', 'c', '-', '-o', path], { input: functions.join('\n') });
  return path;
}

function open(failing: FunctionName, result = '1') {
  const socket = join(directory, 'kvmi.sock');
  return openSession({ name: 'guest', socket, libraryPath: libraryThatFails(failing, result) });
}

describe('a hypervisor that is there but fails', () => {
  test('a resume: what runs is unknown then, so nothing is written any more', () => {
    const session = open('vmi_resume_vm');
    expect(codeOf(() => whileQuiescent(session, () => session.writePhysical(0n, Buffer.of(1))))).toBe(
      'HYPERVISOR_STUCK',
    );
    expect(codeOf(() => whileQuiescent(session, () => session.writePhysical(0n, Buffer.of(1))))).toBe(
      'HYPERVISOR_GONE',
    );
    expect(codeOf(() => session.close())).toBe('nothing thrown');
  });

  test('a pause: nothing is written', () => {
    const session = open('vmi_pause_vm');
    expect(codeOf(() => session.pause())).toBe('HYPERVISOR_FAILED');
    expect(codeOf(() => session.writePhysical(0n, Buffer.of(1)))).toBe('NOT_QUIESCENT');
    session.close();
  });

  test.each<FunctionName>(['vmi_register_event', 'vmi_init'])('%s: the attach', (failing) => {
    expect(codeOf(() => open(failing))).toBe(failing === 'vmi_init' ? 'ATTACH_FAILED' : 'HYPERVISOR_FAILED');
  });

  test('giving permissions back: detaching goes on, and the failure comes out at its end', () => {
    const session = open('vmi_set_mem_event', `third == ${ACCESS_NONE}`);
    session.trapAccess(3n);
    expect(codeOf(() => session.close())).toBe('HYPERVISOR_FAILED');
    expect(codeOf(() => session.close())).toBe('nothing thrown');
  });
});
