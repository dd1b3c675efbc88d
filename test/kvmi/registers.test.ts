import { afterEach, describe, expect, it } from 'vitest';
import { Id, type ScriptedPeer } from './peer.js';
import { attach, isBundled, type Program } from './program.js';

let program: Program;
let peer: ScriptedPeer;
async function start(): Promise<void> {
  ({ program, peer } = await attach({ vcpus: 2 }));
}
afterEach(async () => {
  expect(await program.end()).toBe(0);
});

/** Offsets in x86_registers_t, and what the scripted peer's vCPUs hold there. */
const EXPECTED: Record<number, bigint> = {
  0: 0x100n, // rax
  8: 0x102n, // rcx
  16: 0x103n, // rdx
  24: 0x101n, // rbx
  32: 0x106n, // rsp
  40: 0x107n, // rbp
  48: 0x104n, // rsi
  56: 0x105n, // rdi
  64: 0x108n, // r8
  120: 0x10fn, // r15
  128: 0x111n, // rflags
  136: 0n, // dr6
  152: 0x110n, // rip
  160: 0x80050033n, // cr0
  168: 0xc2n, // cr2
  176: 0x1aa000n, // cr3
  184: 0x3506f8n, // cr4
  192: 0x1_0000_0174n, // sysenter_cs
  200: 0x1_0000_0175n,
  208: 0x1_0000_0176n,
  216: 0xd01n, // efer
  224: 0x1_c000_0081n, // star
  232: 0x1_c000_0082n, // lstar
  240: 0n, // pat
  248: 0x1_c000_0083n, // cstar
  256: 0x5003n, // fs_base
  264: 0xffff3n,
  272: 0x13n,
  280: 0xafbn,
  288: 0x5004n, // gs_base
  320: 0x5000n, // cs_base
  336: 0x10n, // cs_sel
  344: 0xafbn, // cs_arbytes: type b, s, dpl 3, present, l, g
  352: 0x5005n, // ss_base
  384: 0x5001n, // ds_base
  416: 0x5002n, // es_base
  448: 0x5006n, // tr_base
  480: 0x5007n, // ldt_base
  512: 0n, // shadow_gs
  520: 0xfffff800_00002000n, // idtr
  528: 0xfffn,
  536: 0xfffff800_00001000n, // gdtr
  544: 0x57n,
};

describe('registers', () => {
  it('are asked for with the seven MSRs, and each ends in its place', async () => {
    await start();
    const [status, bytes] = (await program.result('registers 1')).split(' ');
    expect(status).toBe('0');
    const registers = Buffer.from(bytes!, 'hex');
    expect(registers).toHaveLength(568);
    for (const [offset, value] of Object.entries(EXPECTED))
      expect([offset, registers.readBigUInt64LE(Number(offset))]).toEqual([offset, value]);
    expect(peer.all(Id.getRegisters).map((m) => m.body.toString('hex'))).toEqual([
      `0100000000000000${'0700000000000000'}${'740100007501000076010000'}${'800000c0810000c0820000c0830000c0'}`,
    ]);
  });

  it('are set as one: the general ones, RIP and RFLAGS in KVM order', async () => {
    await start();
    expect(await program.result('set-registers 1')).toBe('0');
    const body = peer.all(Id.setRegisters)[0]!.body;
    expect(body).toHaveLength(8 + 144);
    expect(body.toString('hex', 0, 8)).toBe('0100000000000000');
    // the program gave every field 0x1000 plus its index in x86_registers_t
    const order = [0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 19, 16];
    const values = order.map((_, i) => Number(body.readBigUInt64LE(8 + 8 * i)));
    expect(values).toEqual(order.map((field) => 0x1000 + field));
  });

  it('are read and written one by one, with the others unchanged', async () => {
    await start();
    const [RSP, RIP, CR3, MSR_LSTAR, DR7] = [7, 8, 20, 71, 28];
    expect(await program.result(`register 0 ${RSP}`)).toBe('0 0x106');
    expect(await program.result(`register 0 ${CR3}`)).toBe('0 0x1aa000');
    expect(await program.result(`register 0 ${MSR_LSTAR}`)).toBe('0 0x1c0000082');
    expect(await program.result(`register 0 ${DR7}`)).toBe('1 0x0');
    expect(await program.result(`set-register 0 ${RIP} 0xfffff80112345678`)).toBe('0');
    expect(await program.result(`set-register 0 ${CR3} 0`)).toBe('1');
    const values = peer.all(Id.setRegisters).map((m) => m.body.readBigUInt64LE(8 + 128));
    expect(values).toEqual([0xfffff801_12345678n]);
    expect(peer.all(Id.setRegisters)[0]!.body.readBigUInt64LE(8)).toBe(0x100n);
  });

  it('of a vCPU that does not exist are refused', async () => {
    await start();
    if (!isBundled) for (const id of [Id.getRegisters, Id.setRegisters]) peer.answers.set(id, () => -22);
    for (const command of ['registers 2', 'set-registers 2', 'register 65536 0', 'set-register 2 0 0'])
      expect(await program.result(command)).toMatch(/^1/);
    if (isBundled) expect(peer.all(Id.getRegisters)).toEqual([]);
  });

  it('that the hypervisor refuses are a failure', async () => {
    await start();
    peer.answers.set(Id.getRegisters, () => -11);
    peer.answers.set(Id.setRegisters, () => -11);
    expect(await program.result('registers 0')).toMatch(/^1 /);
    expect(await program.result('set-registers 0')).toBe('1');
    expect(await program.result('paging 0')).toBe('1');
  });
});
