// libvmi ABI over KVMI
