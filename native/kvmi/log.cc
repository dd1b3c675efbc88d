#include "log.h"

#include <cstdarg>
#include <cstdio>

namespace kvmi {

void complain(const char *format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  fprintf(stderr, "kvmi: %s\n", line);
}

}  // namespace kvmi
