/** What the conformance suite shows of KVM and Xen defines otherwise, or has not. */
export const DEFINED_OTHERWISE: readonly { readonly name: string; readonly reason: string }[] = [
  {
    name: 'the wire: greetings, versions, the order of commands, replies that are late, refused or hostile',
    reason: 'Xen is called, not spoken to over a socket',
  },
  {
    name: 'a hypervisor that does not answer, and a thread that is freed by cutting its connection',
    reason: 'a hypercall returns by itself, and there is no connection to cut',
  },
  {
    name: 'a hypervisor that refuses registers, permissions or a pause while its guest lives',
    reason: 'Xen cannot be told to; a domain that is destroyed refuses all of them, and has its checks',
  },
  {
    name: 'a violation that is answered with nothing completes on memory',
    reason: 'on Xen it is raised again; EMULATE completes it',
  },
  {
    name: 'DENY, EMULATE and EMULATE_NOWRITE have no effect',
    reason: 'Xen carries EMULATE and EMULATE_NOWRITE out',
  },
  {
    name: 'data of fewer bytes than are read is laid over memory, and data is laid by its address',
    reason: "Xen reads zeros behind it, and gives every read of one instruction the data's first bytes",
  },
  {
    name: 'an access that crosses pages, and a string instruction, are several violations with data each',
    reason:
      'Xen emulates the whole instruction after the first; memtables shows it the bytes in memory instead',
  },
  {
    name: 'data of more than 256 bytes is not answered',
    reason: 'Xen reads no more than an instruction does, and the rest is cut off',
  },
  {
    name: 'CR3 cannot be set',
    reason: 'libvmi sets it on Xen; memtables never does',
  },
  {
    name: 'the permissions of pages stay when a session is destroyed',
    reason: 'Xen lets the library give them back',
  },
  {
    name: 'a session of memtables itself, and attaching again and again with a relocation',
    reason: "the rig's main job attaches, traps, relocates and unloads through the same library",
  },
  {
    name: "libvmi's example programs",
    reason: 'they would show libvmi, not what they do on Xen that the checks do not',
  },
  {
    name: 'a page that was read is stale until it is flushed',
    reason: 'libvmi keeps a mapping on Xen, in which the guest is seen at work',
  },
  {
    name: 'a hypervisor that has gone refuses a pause',
    reason: 'a domain that was destroyed is there, and can be paused, as long as somebody holds on to it',
  },
];
