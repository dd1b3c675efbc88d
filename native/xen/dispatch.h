#pragma once

#include "instance.h"

namespace xen {

/** When the session ends: lets every vCPU go on whose event nobody has handled. */
void letGoOutstanding(Instance &vmi);

}  // namespace xen
