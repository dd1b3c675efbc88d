import { strict as assert } from 'node:assert';
import { gfnOf } from '../../vmi/address.js';
import type { AbiProgram } from '../abi-program.js';
import { CODE_PAGE, DATA_BASE, DETOUR, VCPUS } from '../watched-guest.js';
import type { Check } from './bench.js';

// `reg_t`.
const [RBX, RIP, R15, R14, CR0, CR3, CR4, EFER] = [1, 8, 17, 16, 18, 20, 21, 74];
const PROTECTION_AND_PAGING = 0x8000_0001n;
const PAE = 0x20n;
const LONG_MODE_ACTIVE = 0x400n;

async function register(program: AbiProgram, vcpu: number, number: number): Promise<bigint> {
  const [status, value] = (await program.result(`register ${vcpu} ${number}`)).split(' ');
  assert.equal(status, '0');
  return BigInt(value!);
}

export const REGISTERS: readonly Check[] = [
  {
    name: 'each vCPU has its own registers, and each register its own place',
    async run(bench) {
      const program = await bench.attach();
      await program.run('pause');
      const own = new Set<bigint>();
      for (let vcpu = 0; vcpu < VCPUS; vcpu++) {
        assert.equal(await register(program, vcpu, RBX), DATA_BASE);
        assert.equal(await register(program, vcpu, CR3), bench.guest.pageTable);
        assert.equal(gfnOf(await register(program, vcpu, RIP)), gfnOf(CODE_PAGE.gva));
        const [cr0, cr4, efer] = [
          await register(program, vcpu, CR0),
          await register(program, vcpu, CR4),
          await register(program, vcpu, EFER),
        ];
        assert.equal(cr0 & PROTECTION_AND_PAGING, PROTECTION_AND_PAGING);
        assert.equal(cr4 & PAE, PAE);
        assert.equal(efer & LONG_MODE_ACTIVE, LONG_MODE_ACTIVE);
        own.add(await register(program, vcpu, R14));
      }
      assert.equal(own.size, VCPUS);
      await program.run('resume');
    },
  },
  {
    name: 'a register that is set is seen by its vCPU, and by no other',
    async run(bench) {
      const program = await bench.attach();
      for (let vcpu = 0; vcpu < VCPUS; vcpu++) {
        const value = 0x8877_6655_4433_2210n + BigInt(vcpu);
        await program.run('pause');
        assert.equal(await program.result(`set-register ${vcpu} ${R15} ${value}`), '0', program.stderr);
        assert.equal(await register(program, vcpu, R15), value);
        await program.run('resume');
      }
      await bench.allGoOn();
      for (let vcpu = 0; vcpu < VCPUS; vcpu++)
        assert.equal(bench.result(vcpu, 'seenR15'), 0x8877_6655_4433_2210n + BigInt(vcpu));
    },
  },
  {
    name: 'a vCPU goes on where its RIP was set to',
    async run(bench) {
      const program = await bench.attach();
      for (let vcpu = 0; vcpu < VCPUS; vcpu++) {
        const detours = bench.ofEach('detours');
        await program.run('pause');
        assert.equal(await program.result(`set-register ${vcpu} ${RIP} ${DETOUR}`), '0', program.stderr);
        await program.run('resume');
        await bench.allGoOn();
        detours[vcpu] = detours[vcpu]! + 1n;
        assert.deepEqual(bench.ofEach('detours'), detours);
      }
    },
  },
  {
    name: 'there are no registers of a vCPU that does not exist',
    async run(bench) {
      const program = await bench.attach();
      await program.run('pause');
      for (const vcpu of [VCPUS, 4096, 0xffff_ffff]) {
        assert.match(await program.result(`registers ${vcpu}`), /^1 /);
        assert.equal(await program.result(`set-registers ${vcpu}`), '1');
        assert.match(await program.result(`register ${vcpu} ${RIP}`), /^1 /);
      }
      await program.run('resume');
      await bench.allGoOn();
    },
  },
];
