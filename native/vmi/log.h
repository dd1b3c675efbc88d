#pragma once

namespace vmi {

/** What the complaints of this library begin with. */
extern const char *const kLibraryName;

/** Says on stderr why a call failed; the C interface has no other way to. */
[[gnu::format(printf, 1, 2)]] void complain(const char *format, ...);

}  // namespace vmi
