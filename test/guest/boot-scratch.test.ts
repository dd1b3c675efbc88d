import { test } from 'vitest';
import { createMachine } from '../../src/machine/create-machine.js';
import { loadGuest } from '../../src/guest/loader.js';
import { readGuestReport } from '../../src/guest/report.js';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { predictChecksum } from '../../src/guest/workload-model.js';
test('boot', () => {
  const { image, sites } = readGuestArtefacts();
  const m = createMachine({ vcpus: Number(process.env.V ?? 1), memoryBytes: 32 << 20 });
  const g = loadGuest(m, { image, seed: 42 });
  console.log(g.kernelBase.toString(16));
  const r0 = m.step(0, 2000);
  console.log(r0, m.takeConsole(), m.registers(0).rip.toString(16));
  m.setTimer(0xd1, 1000);
  for (let i = 0; i < 10; i++) { const o = m.run(50000); if (o.traps.length) console.log(o); }
  const c = m.takeConsole();
  console.log(c, (m.registers(0).rip-g.kernelBase).toString(16));
  const r = readGuestReport(m, g);
  console.log(r);
  for (const s of r!.streams) console.log(s.form, s.vcpu, s.count, s.checksum, s.count < 5000000n ? predictChecksum(sites.calls, s.form, s.seed, s.count) : '');
});
