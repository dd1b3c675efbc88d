#pragma once

#include <libvmi/libvmi.h>

#include "connection.h"

namespace kvmi {

/** Handles one event and answers it, unless it reports a pause: that is what vmi_resume_vm answers. */
void dispatch(vmi_instance_t vmi, const Event &event);

/** Dispatches what is queued now. Events that arrive meanwhile are left for the next time. */
void dispatchQueued(vmi_instance_t vmi);

}  // namespace kvmi
