#include "log.h"

#include <cstdarg>
#include <cstdio>

namespace vmi {

void complain(const char *format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  fprintf(stderr, "%s: %s\n", kLibraryName, line);
}

}  // namespace vmi
