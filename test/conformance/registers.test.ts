import { describe, expect, it } from 'vitest';
import { Id } from '../kvmi/peer.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';

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

/** The numbers by which single registers are read and written; the value is what the scripted peer tells. */
const READABLE: readonly [number: bigint, value: bigint][] = [
  [0n, 0x100n], // RAX
  [1n, 0x101n], // RBX
  [2n, 0x102n], // RCX
  [3n, 0x103n], // RDX
  [4n, 0x107n], // RBP
  [5n, 0x104n], // RSI
  [6n, 0x105n], // RDI
  [7n, 0x106n], // RSP
  [8n, 0x110n], // RIP
  [9n, 0x111n], // RFLAGS
  [10n, 0x108n], // R8
  [17n, 0x10fn], // R15
  [18n, 0x80050033n], // CR0
  [19n, 0xc2n], // CR2
  [20n, 0x1aa000n], // CR3
  [21n, 0x3506f8n], // CR4
  [50n, 0x5003n], // FS_BASE
  [55n, 0xfffff800_00002000n], // IDTR_BASE
  [71n, 0x1_c000_0082n], // MSR_LSTAR
  [74n, 0xd01n], // MSR_EFER
  [119n, 0x1_c000_0081n], // MSR_STAR
];
const [DR7, CR3, RIP] = [28, 20, 8];
/** Of the settable registers in libvmi's order: where each lies in KVM's. */
const KVM_INDEX = [0, 1, 2, 3, 7, 4, 5, 6, 16, 17, 8, 9, 10, 11, 12, 13, 14, 15];

describe.each(LIBRARIES)('registers with $library', ({ path }) => {
  const { start } = programsOn(path);

  describe.each(VCPU_COUNTS)('of each of %s vCPUs', (vcpus) => {
    const all = Array.from({ length: vcpus }, (_, vcpu) => vcpu);

    it('are asked for with the seven MSRs, and each ends in its place', async () => {
      const { program, peer } = await start({ vcpus });
      for (const vcpu of all) {
        const [status, bytes] = (await program.result(`registers ${vcpu}`)).split(' ');
        expect(status).toBe('0');
        const registers = Buffer.from(bytes!, 'hex');
        expect(registers).toHaveLength(568);
        for (const [offset, value] of Object.entries(EXPECTED))
          expect([offset, registers.readBigUInt64LE(Number(offset))]).toEqual([offset, value]);
      }
      expect(peer.all(Id.getRegisters).map((m) => m.body.toString('hex'))).toEqual(
        all.map(
          (vcpu) =>
            `0${vcpu}00000000000000${'0700000000000000'}${'740100007501000076010000'}${'800000c0810000c0820000c0830000c0'}`,
        ),
      );
    });

    it('are set as one: the general ones, RIP and RFLAGS in KVM order', async () => {
      const { program, peer } = await start({ vcpus });
      for (const vcpu of all) expect(await program.result(`set-registers ${vcpu}`)).toBe('0');
      // the program gave every field 0x1000 plus its index in x86_registers_t
      const order = [0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 19, 16];
      for (const [vcpu, { body }] of peer.all(Id.setRegisters).entries()) {
        expect(body).toHaveLength(8 + 144);
        expect(body.toString('hex', 0, 8)).toBe(`0${vcpu}00000000000000`);
        const values = order.map((_, i) => Number(body.readBigUInt64LE(8 + 8 * i)));
        expect(values).toEqual(order.map((field) => 0x1000 + field));
      }
    });

    it('are refused for a vCPU that does not exist', async () => {
      const { program } = await start({ vcpus });
      for (const command of ['registers', 'set-registers'])
        expect(await program.result(`${command} ${vcpus}`)).toMatch(/^1/);
      expect(await program.result(`register ${vcpus} 0`)).toMatch(/^1/);
      expect(await program.result(`set-register ${vcpus} 0 0`)).toBe('1');
    });
  });

  it('are read one by one', async () => {
    const { program } = await start();
    for (const [number, value] of READABLE)
      expect([number, await program.result(`register 0 ${number}`)]).toEqual([
        number,
        `0 0x${value.toString(16)}`,
      ]);
    expect(await program.result(`register 0 ${DR7}`)).toBe('1 0x0');
    expect(await program.result('register 0 100000')).toBe('1 0x0');
  });

  it('are written one by one, with the others unchanged', async () => {
    const { program, peer } = await start();
    for (const number of KVM_INDEX.keys())
      expect(await program.result(`set-register 1 ${number} 0xfffff80112345678`)).toBe('0');
    for (const [number, { body }] of peer.all(Id.setRegisters).entries()) {
      const expected = Array.from({ length: 18 }, (_, i) => 0x100n + BigInt(i));
      expected[KVM_INDEX[number]!] = 0xfffff801_12345678n;
      expect(expected.map((_, i) => body.readBigUInt64LE(8 + 8 * i))).toEqual(expected);
    }
  });

  it('that KVM does not let be set are refused, and nothing is', async () => {
    const { program, peer } = await start();
    expect(await program.result(`set-register 0 ${CR3} 0`)).toBe('1');
    expect(await program.result('set-register 0 100000 0')).toBe('1');
    expect(peer.all(Id.setRegisters)).toEqual([]);
  });

  it('that the hypervisor refuses are a failure, and the session goes on', async () => {
    const { program, peer } = await start();
    peer.answers.set(Id.getRegisters, () => -11);
    peer.answers.set(Id.setRegisters, () => -11);
    expect(await program.result('registers 0')).toMatch(/^1 /);
    expect(await program.result('set-registers 0')).toBe('1');
    expect(await program.result(`register 0 ${RIP}`)).toBe('1 0x0');
    expect(await program.result('paging 0')).toBe('1');
    peer.answers.clear();
    expect(await program.result(`register 0 ${RIP}`)).toBe('0 0x110');
  });
});
