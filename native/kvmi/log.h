#pragma once

namespace kvmi {

/** Says on stderr why a call failed; the C interface has no other way to. */
[[gnu::format(printf, 1, 2)]] void complain(const char *format, ...);

}  // namespace kvmi
