// The engine on a hypervisor that answers events as Xen does: nothing may get slow, stuck or visible there.
import { describe, expect, test } from 'vitest';
import { openSessionOn } from '../../src/libvmi/open-session.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { XenLibrary } from '../support/xen-library.js';
import { hookAll, relocations, serve } from './relocated-guest.js';

describe('on Xen', () => {
  test.each([1, 2])(
    'with %s vCPUs the guest computes what it did, sees no changed byte, and is identical after unload',
    (vcpus) => {
      const guest = EmbeddedGuest.boot({ seed: 40 + vcpus, vcpus });
      const library = new XenLibrary(guest.machine);
      const session = openSessionOn(library, { name: 'guest' });
      const before = guest.image();
      const { engine, events, journal } = guest.attach({ hypervisor: session });
      hookAll(guest, engine);
      engine.relocating = true;
      const { sweeps } = guest.report().integrity;
      serve(
        session,
        engine,
        () => relocations(events).length > 20 && guest.report().integrity.sweeps > sweeps + 1n,
      );
      expect(library.answers.withData).toBeGreaterThan(0);
      expect(library.answers.steps).toBeGreaterThan(0);
      engine.unload();
      session.close();
      expect(guest.wrongStreams()).toEqual([]);
      expect(guest.report().integrity.mismatches).toBe(0n);
      expect(guest.report().bugCheck).toBeUndefined();
      expect(guest.image()).toBe(before);
      expect(library.stepping).toBe(false);
      expect(journal.outstanding).toBe(0);
    },
  );
});
