// Pause holds a pod's namespaces open and does nothing else: the stand-in for registry.k8s.io/pause.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// Where containers share the pod's process namespace this is pid 1; ignored children are reaped by the kernel.
	signal.Ignore(syscall.SIGCHLD)
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	<-end
}
