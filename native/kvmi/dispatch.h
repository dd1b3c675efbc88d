#pragma once

#include <libvmi/libvmi.h>

#include "connection.h"

namespace kvmi {

/** Handles what is queued until nothing is, also what callbacks cause to be queued. */
void dispatchQueued(vmi_instance_t vmi);

/** When the session ends: lets every vCPU go on whose event nobody has handled. */
void letGoOutstanding(vmi_instance_t vmi);

}  // namespace kvmi
